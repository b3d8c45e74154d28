"""Files that methods need, made on the command line."""

import json

import pytest

from vlm_steer.directions import Directions


@pytest.fixture
def pairs(tmp_path, pictures):
    """A file of pairs about the pictures."""
    path = tmp_path / "pairs.jsonl"
    pair = {"question": "What is there?", "value": "a cat", "h_value": "a dog and a red ball"}
    names = [str(picture) for picture in pictures[:2]]
    path.write_text("\n".join(json.dumps({"image": name, **pair}) for name in names))
    return path


def test_directions_are_built_and_steer(run, pairs, pictures, tmp_path):
    output = tmp_path / "d.safetensors"
    options = ("--model", "tiny", "--pairs", pairs, "--images", "/", "--output", output)
    code, out, _ = run("build", "vti", *options)
    assert code == 0
    assert "6 directions" in out
    made = Directions.load(output)
    assert made.made_of["pairs"] == 2
    code, out, _ = run(
        *("generate", "--model", "tiny", "--image", pictures[0], "--prompt", "What is there?"),
        *("--method", "vti", "--set", f"vti.directions={output}", "--set", "vti.strength=4"),
        *("--max-new-tokens", 4, "--json"),
    )
    assert code == 0
    assert json.loads(out)["effects"][0]["vti"]["layers"]["0"]["rows"] > 0


def test_visual_directions_are_built_and_steer(run, pairs, pictures, tmp_path):
    output = tmp_path / "d.safetensors"
    options = ("--model", "tiny", "--pairs", pairs, "--images", "/", "--output", output)
    code, out, _ = run("build", "vti", *options, "--visual-trials", 2, "--mask", 0.9)
    assert code == 0
    assert "6 of 128 for the vision tower, from 2 masks each" in out
    made = Directions.load(output)
    assert made.visual.shape == (6, 128)
    assert (made.visual.norm(dim=1) > 0).all()
    code, out, _ = run(
        *("generate", "--model", "tiny", "--image", pictures[0], "--prompt", "What is there?"),
        *("--method", "vti", "--set", f"vti.directions={output}", "--set", "vti.visual_alpha=4"),
        *("--max-new-tokens", 2, "--json"),
    )
    assert code == 0
    assert json.loads(out)["effects"][0]["vti"]["vision_states"] > 0


def test_a_share_of_patches_above_one_is_refused(run, pairs, tmp_path):
    options = ("--model", "tiny", "--pairs", pairs, "--images", "/", "--mask", 1.5)
    code, _, err = run("build", "vti", *options, "--output", tmp_path / "d.safetensors")
    assert code == 2
    assert "--mask 1.5" in err


def test_a_file_is_not_overwritten(run, pairs, tmp_path):
    output = tmp_path / "d.safetensors"
    output.write_bytes(b"mine")
    options = ("--model", "tiny", "--pairs", pairs, "--images", "/", "--output", output)
    code, _, err = run("build", "vti", *options)
    assert (code, output.read_bytes()) == (2, b"mine")
    assert "exists already" in err


def test_missing_pairs_fail_by_name(run, tmp_path):
    options = ("--pairs", tmp_path / "no.jsonl", "--images", tmp_path)
    output = tmp_path / "d.safetensors"
    code, _, err = run("build", "vti", "--model", "tiny", *options, "--output", output)
    assert code == 1
    assert "do not exist" in err


def test_head_scores_are_built_and_mask(run, pictures, tmp_path):
    output = tmp_path / "heads.json"
    options = ("--model", "tiny", "--image", pictures[0], "--max-new-tokens", 4)
    code, out, _ = run("build", "decore", *options, "--output", output)
    assert code == 0
    assert "heads on 1 images" in out
    code, out, _ = run(
        *("generate", "--model", "tiny", "--image", pictures[0], "--prompt", "What is there?"),
        *("--method", "decore", "--set", f"decore.head_file={output}"),
        *("--max-new-tokens", 4, "--json"),
    )
    assert code == 0
    assert json.loads(out)["effects"][0]["decore"]["probability_moved"] > 0
