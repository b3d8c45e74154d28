"""Questions about one image that share its pass, in a run."""

import pytest
from PIL import Image

from tests.contract.settings import ACTIVE
from vlm_steer.engine.steer import Steering
from vlm_steer.generation import render_prompt
from vlm_steer_eval.running.arms import parse_arms
from vlm_steer_eval.running.generation import Generator, Settings
from vlm_steer_eval.running.parts import LOG_NAME
from vlm_steer_eval.running.prefix import share_prompts
from vlm_steer_eval.running.runner import run_arms
from vlm_steer_eval.running.sources import local_pope

ARMS = {"var": ACTIVE["var"], "spin": "spin", "vcd": "vcd"}


@pytest.fixture
def run(tiny, question_file, image_folder, tmp_path):
    """Runs the questions; returns the result and how many rows every shared pass had."""
    task = local_pope([question_file], image_folder)

    def start(name, *, arms=ARMS, settings=None, **options):
        return run_arms(
            task,
            parse_arms(arms),
            *tiny,
            model_name="tiny",
            settings=settings or Settings(max_new_tokens=3),
            batch_size=4,
            output=tmp_path / name,
            **options,
        )

    return start


def _answers(result):
    return {
        (arm, item): (record["text"], record["layout"], record["changed"], record["tokens"])
        for arm, records in result.records.items()
        for item, record in records.items()
    }


@pytest.mark.parametrize(
    "settings",
    [
        Settings(max_new_tokens=3),
        Settings(max_new_tokens=3, num_beams=2),
        Settings(max_new_tokens=3, temperature=1.5, seed=3),
    ],
    ids=["greedy", "beams", "sampled"],
)
def test_shared_answers_are_those_of_whole_prompts(run, settings, monkeypatch):
    passes = []
    prefill = Steering.prefill

    def counted(self, **inputs):
        passes.append(len(inputs["input_ids"]))
        return prefill(self, **inputs)

    monkeypatch.setattr(Steering, "prefill", counted)
    whole = run("whole", settings=settings)
    assert not passes
    shared = run("shared", settings=settings, share_prefix=True)
    # Three arms of two batches with two images each, and one batch to try each arm; never vcd.
    assert passes == [2] * 9
    assert _answers(shared) == _answers(whole)
    for arm in ("none", "var"):
        for item, record in shared.records[arm].items():
            assert record["margin"] == pytest.approx(whole.records[arm][item]["margin"], abs=1e-4)
    assert shared.notes == whole.notes


def test_an_interrupted_shared_run_ends_with_the_same_log(run, tmp_path):
    run("once", arms="none", share_prefix=True)
    log = (tmp_path / "once" / LOG_NAME).read_text()
    torn = tmp_path / "twice"
    torn.mkdir()
    (torn / LOG_NAME).write_text("".join(log.splitlines(keepends=True)[:5])[:-20])
    run("twice", arms="none", share_prefix=True)
    assert sorted((torn / LOG_NAME).read_text().splitlines()) == sorted(log.splitlines())


def test_an_arm_whose_answers_change_generates_from_whole_prompts(run, monkeypatch):
    whole = run("whole", arms="none")
    shared = Generator._shared

    def spoilt(self, prompts, images, sharing):
        inputs = shared(self, prompts, images, sharing)
        if inputs is not None:
            inputs["input_ids"][:, -2] = 7
            inputs["input_ids"] = inputs["input_ids"][:, :-1]
            inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
        return inputs

    monkeypatch.setattr(Generator, "_shared", spoilt)
    result = run("spoilt", arms="none", share_prefix=True)
    assert "computed whole" in result.notes["none"][0]
    assert _answers(result) == _answers(whole)


def _share(tiny, texts, digests, processor=None):
    model, own = tiny
    prompts = [render_prompt(own, text) for text in texts]
    images = [Image.new("RGB", (96, 96)) for _ in texts]
    token = model.config.image_token_id
    return share_prompts(processor or own, prompts, images, digests, [token])


def test_prompts_are_split_behind_the_image_and_padded_between(tiny):
    shared = _share(tiny, ["Is there a car?", "Is there a traffic light?", "A?"], ["x", "y", "x"])
    assert shared.rows.tolist() == [0, 1, 0]
    prefix = shared.prefix["input_ids"]
    assert len(prefix) == len(shared.prefix["pixel_values"]) == 2
    assert (prefix[:, -1] == tiny[0].config.image_token_id).all()
    assert (shared.input_ids[:, : prefix.shape[1]] == prefix[0]).all()
    assert shared.attention_mask[1].all()
    assert not shared.attention_mask[2].all()
    for text, ids, mask in zip(
        ["Is there a car?", "Is there a traffic light?", "A?"],
        shared.input_ids,
        shared.attention_mask,
        strict=True,
    ):
        prompt = render_prompt(tiny[1], text)
        whole = tiny[1](images=[Image.new("RGB", (96, 96))], text=[prompt], return_tensors="pt")
        assert ids[mask.bool()].tolist() == whole["input_ids"][0].tolist()


def test_nothing_is_shared_where_anything_is_in_doubt(tiny):
    assert _share(tiny, ["A?", "B?"], ["x", "y"]) is None

    class Other:
        """A processor that differs from the model's own in one respect."""

        def __init__(self, **changes):
            self.__dict__.update(changes)

        def __getattr__(self, name):
            return getattr(tiny[1], name)

        def __call__(self, **inputs):
            encoded = tiny[1](**inputs)
            encoded.update(self.__dict__.get("extra", {}))
            return encoded

    assert _share(tiny, ["A?", "B?"], ["x", "x"], Other()) is not None
    unknown = Other(extra={"qformer_input_ids": None})
    assert _share(tiny, ["A?", "B?"], ["x", "x"], unknown) is None
    assert _share(tiny, ["A?", "B?"], ["x", "x"], Other(image_token=None)) is None
    splitting = Other(tokenizer=lambda texts, **_: {"input_ids": [[1, 2] for _ in texts]})
    assert _share(tiny, ["A?", "B?"], ["x", "x"], splitting) is None
