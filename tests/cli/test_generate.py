"""The command that steers."""

import json
from pathlib import Path

import pytest
import torch

from vlm_steer.commands.generate import Decoding, answer, summarise
from vlm_steer.loading import load_model
from vlm_steer.registry import list_methods
from vlm_steer.tiny import model_dir


@pytest.fixture
def ask(run, pictures):
    """``vlm-steer generate`` about the first picture, with more options."""

    def ask(*more, n=1):
        images = [part for path in pictures[:n] for part in ("--image", path)]
        fixed = ("--model", "tiny", "--prompt", "Is there a cat?", "--max-new-tokens", 6)
        return run("generate", *images, *fixed, *more)

    return ask


def test_without_a_method_the_answer_is_that_of_the_model(ask, pictures):
    from PIL import Image

    model, processor = load_model("tiny")
    prompt = "USER: <image>\nIs there a cat? ASSISTANT:"
    inputs = processor(images=Image.open(pictures[0]), text=prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    code, out, _ = ask()
    assert (code, out.strip()) == (0, expected.strip())


def test_json_holds_answers_configuration_and_effects(ask):
    code, out, _ = ask("--method", "pai+vcd", "--set", "pai.alpha=3", "--compare", "--json", n=2)
    report = json.loads(out)
    assert code == 0
    assert list(report["answers"]) == ["none", "pai+vcd"]
    assert [len(texts) for texts in report["answers"].values()] == [2, 2]
    pai, vcd = report["configuration"]["methods"]
    assert (pai["method"], pai["alpha"], vcd["method"]) == ("pai", 3.0, "vcd")
    assert len(report["effects"]) == 2
    assert set(report["effects"][0]) == {"pai", "vcd"}


def test_compare_shows_both_answers_and_what_was_changed(ask):
    code, out, _ = ask("--method", "pai", "--set", "alpha=3", "--compare")
    assert code == 0
    assert "none" in out
    assert "pai: 6 layers" in out
    assert "next-token probability moved" in out


def test_a_steering_that_changes_nothing_is_warned_about(ask):
    code, _, err = ask("--method", "var", "--set", "tau=1000")
    assert code == 0
    assert "Warning: var: no sink dimensions found" in err


def test_several_images_are_answered_in_order_whatever_the_batch(ask):
    one = json.loads(ask("--json", n=2).out)
    two = json.loads(ask("--json", "--batch-size", 2, n=2).out)
    assert one["answers"] == two["answers"]
    assert len(two["effects"]) == 1


def test_results_are_written_where_asked(ask, tmp_path):
    code, out, _ = ask("--output", tmp_path / "new" / "run")
    report = json.loads((tmp_path / "new" / "run" / "generate.json").read_text())
    assert code == 0
    assert report["answers"]["none"] == [out.strip()]


def test_sampling_repeats_with_its_seed(ask):
    first, again, other = (
        json.loads(ask("--json", "--temperature", 5, "--seed", seed).out)["answers"]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_beam_search_runs_steered(ask):
    assert ask("--method", "pai+vcd", "--num-beams", 2).code == 0


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--method", "vaar"), 2, "Did you mean 'var'?"),
        (("--method", "gone.yaml"), 2, "gone.yaml: cannot be read"),
        (("--method", "pai", "--set", "alpa=3"), 2, "Did you mean 'alpha'?"),
        (("--set", "alpha=3"), 2, "no method is in use"),
        (("--image", "gone.png"), 1, "image gone.png does not exist"),
    ],
)
def test_mistakes_are_reported_before_the_model_loads(ask, monkeypatch, more, code, message):
    def never(*_args, **_options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vlm_steer.loading.load_model", never)
    ran = ask(*more)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("Error: ")
    assert message in ran.err


def test_a_folder_without_a_model_is_named(run, tmp_path, pictures):
    code, _, err = run(
        "generate", "--model", tmp_path, "--image", pictures[0], "--prompt", "What is here?"
    )
    assert code == 1
    assert str(tmp_path) in err


def test_check_attaches_every_method_to_a_saved_model(run):
    code, out, _ = run("models", "--check", model_dir(), "--json")
    report = json.loads(out)
    assert code == 0
    assert list(report) == list_methods()
    assert report["pai"]["methods"][0]["layers"] == [0, 1, 2, 3, 4, 5]
    assert report["vcd"]["model"] == "LlavaForConditionalGeneration"


def test_check_says_what_one_method_does(run):
    code, out, _ = run("models", "--check", "tiny", "--method", "var_official")
    assert code == 0
    assert "LlavaForConditionalGeneration (llava), 6 layers" in out
    assert "var_official" in out
    assert "vcd" not in out


def test_check_reports_a_refusal_as_such(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mixed.yaml").write_text("{method: pai, layers: [2, 32]}")
    report = json.loads(run("models", "--check", "tiny", "--method", "mixed.yaml", "--json").out)
    assert "reach outside this model, which has 6 layers" in report["mixed.yaml"]["refused"]


def test_memory_that_runs_out_halves_the_batch(pictures, monkeypatch):
    from vlm_steer.images import open_image

    model, processor = load_model("tiny")
    sizes = []
    generate = model.generate

    def short_of_memory(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", short_of_memory)
    images = [open_image(path) for path in pictures]
    decoding = Decoding(max_new_tokens=2)
    answers = answer(model, processor, images, "What?", methods=(), decoding=decoding, batch_size=2)
    assert sizes == [2, 1, 1]
    assert len(answers.texts) == 2


def test_an_effect_is_summarised_in_a_line_per_method():
    effect = {
        "pai": {
            "layers": {
                0: {"rows": 2, "heads": 4.0, "mass": 0.25},
                1: {"rows": 2, "heads": 2.0, "mass": 0.5},
                2: {"rows": 0, "heads": 0.0, "mass": 0.0},
            },
            "probability_moved": None,
        },
        "vcd": {"layers": {}, "probability_moved": 0.125},
        "var": {"layers": {}, "probability_moved": None},
    }
    assert summarise(effect) == [
        "pai: 2 layers, 3.0 heads each, attention moved 0.75",
        "vcd: next-token probability moved 0.125",
        "var: changed nothing",
    ]
