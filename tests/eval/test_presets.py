"""Presets of benchmarks: what they fill in, and what a baseline outside its band is told."""

import json
from pathlib import Path

import pytest

from vlm_steer.cli import main
from vlm_steer.config import list_presets, resolve
from vlm_steer.errors import ConfigError
from vlm_steer_eval.benchmarks.registry import BENCHMARKS
from vlm_steer_eval.running.presets import list_benchmark_presets, load_preset

CONFIGS = Path(__file__).parents[2] / "configs" / "benchmarks"


@pytest.fixture
def command(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def _own(folder, **changes):
    """A preset for the question file of the tests."""
    path = folder / "mine.yaml"
    preset = {
        "benchmark": "pope",
        "source": "nobody",
        "data": "two questions about each of four scenes",
        "options": {"suffix": "", "max_new_tokens": 2, "parser": "official"},
        "expected": [
            {"model": "tiny", "metric": "accuracy", "split": "random", "low": low, "high": high,
             "source": "nobody"}
            for low, high in ((0.0, 1.0), (1.5, 2.0))
        ],
    }  # fmt: skip
    path.write_text(json.dumps(preset | changes))
    return path


def _arguments(question_file, image_folder, output):
    return [
        "eval", "pope", "--questions", question_file, "--images", image_folder,
        "--resamples", 20, "--output", output,
    ]  # fmt: skip


@pytest.mark.parametrize("name", list_benchmark_presets())
def test_every_preset_names_a_benchmark_its_options_and_its_sources(name):
    preset = load_preset(name)
    assert preset.benchmark == name.partition("/")[0]
    assert preset.source
    assert preset.data
    for band in preset.expected:
        assert band.low < band.high
        assert band.model == band.model.lower()
        assert band.metric in BENCHMARKS[preset.benchmark].formulas
    assert (CONFIGS / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("name", list_benchmark_presets())
def test_every_option_of_a_preset_is_one_of_its_command(name, command, tmp_path):
    # An unknown arm is refused after the preset's options were checked.
    benchmark = name.partition("/")[0]
    code, _, err = command(
        "eval", benchmark, *REQUIRED.get(benchmark, ()), "--preset", name, "--methods", "paj",
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 2
    assert "Did you mean 'pai'" in err


REQUIRED = {
    "amber": ["--data", "d", "--images", "i"],
    "mme": ["--questions", "q", "--images", "i"],
    "hallusionbench": ["--questions", "q", "--images", "i"],
    "mmhal": ["--template", "t", "--images", "i", "--judge", "hf:judge"],
    "mmvp": ["--questions", "q", "--images", "i"],
}


def test_presets_are_no_methods():
    assert "benchmarks" not in list_presets()
    for name in ("pope/official", "official"):
        assert name not in list_presets()
        with pytest.raises(ConfigError, match="unknown method or preset"):
            resolve(name)


def test_a_baseline_outside_its_band_warns_and_says_so_in_the_scores(
    command, question_file, image_folder, tmp_path
):
    output = tmp_path / "out"
    code, out, err = command(
        *_arguments(question_file, image_folder, output), "--preset", _own(tmp_path)
    )
    assert code == 0
    assert "outside 1.5-2, expected of tiny" in " ".join(err.split())
    assert "lies within 0-1" in out
    scores = json.loads((output / "scores.json").read_text())
    assert scores["parser"] == "official"
    assert [entry["inside"] for entry in scores["preset"]["expected"]] == [True, False]
    settings = json.loads((output / "run.json").read_text())["settings"]
    assert settings["max_new_tokens"] == 2


def test_what_the_user_writes_wins_and_no_band_applies(
    command, question_file, image_folder, tmp_path
):
    output = tmp_path / "out"
    code, out, err = command(
        *_arguments(question_file, image_folder, output), "--preset", _own(tmp_path, images=500),
        "--parser", "opera", "--max-new-tokens", 2,
    )  # fmt: skip
    assert code == 0
    assert "outside" not in err
    scores = json.loads((output / "scores.json").read_text())
    assert scores["parser"] == "opera"
    assert scores["preset"]["deviations"] == {"parser": "opera", "images": 4}
    assert scores["preset"]["expected"] == []
    assert "departs from preset" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "chair"}, "a protocol of chair"),
        ({"options": {"max_new_token": 3}}, "Did you mean 'max_new_tokens'"),
        ({"options": {"max_new_tokens": "many"}}, "max_new_tokens"),
        ({"option": {}}, "unknown key 'option'"),
        ({"expected": [{"model": "x"}]}, "expected.0"),
    ],
)
def test_a_preset_that_cannot_be_meant_is_refused(
    command, question_file, image_folder, tmp_path, changes, message
):
    code, _, err = command(
        *_arguments(question_file, image_folder, tmp_path / "out"),
        "--preset", _own(tmp_path, **changes),
    )  # fmt: skip
    assert code == 2
    assert message in " ".join(err.split())


def test_a_benchmark_without_presets_says_so(command, tmp_path):
    data = ["--questions", tmp_path / "q", "--images", tmp_path, "--output", tmp_path / "out"]
    code, _, err = command("eval", "beaf", *data, "--preset", "pope/official")
    assert (code, "or leave it out: beaf has none" in err) == (2, True)


def test_presets_are_listed_and_shown(command):
    code, out, _ = command("eval", "presets")
    assert code == 0
    assert all(f"{name}:" in out for name in list_benchmark_presets())
    _, out, _ = command("eval", "presets", "chair/64")
    assert "--max-new-tokens 64" in out
    with pytest.raises(ConfigError, match="Did you mean 'pope/official'"):
        load_preset("pope/oficial")


def test_an_image_list_limits_the_captions_and_names_what_is_absent(
    command, image_folder, tmp_path
):
    (tmp_path / "objects.json").write_text(
        json.dumps({"names": ["car"], "objects": {str(i): [0] for i in range(4)}})
    )
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"image_id": 1}\n{"image_id": 3}\n')
    arguments = [
        "eval", "chair", "--objects", tmp_path / "objects.json", "--images", image_folder,
        "--image-list", listed, "--max-new-tokens", 2, "--resamples", 20, "--output",
    ]  # fmt: skip
    assert command(*arguments, tmp_path / "out")[0] == 0
    samples = (tmp_path / "out/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["item"] for line in samples] == ["1", "3"]
    listed.write_text("scene_1.png\n7\n")
    code, _, err = command(*arguments, tmp_path / "other")
    assert code == 1
    assert "1 of the 2 images" in err
