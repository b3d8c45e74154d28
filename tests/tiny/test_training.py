"""Training is resumable to the bit, and packing does not leak between conversations."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm_steer.errors import ConfigError, DataError
from vlm_steer.tiny.model import build_model, build_processor
from vlm_steer.tiny.training import loop, sinks, stages
from vlm_steer.tiny.training.checkpoint import place, restore
from vlm_steer.tiny.training.loop import Recipe, Run, train
from vlm_steer.tiny.training.optim import Muon, cosine
from vlm_steer.tiny.training.packing import Segment, attention_bias, pack

STEPS = (3, 2, 2, 3)
SMALL = (
    "import torch; torch.set_num_threads(1)\n"
    "from pathlib import Path\n"
    "from vlm_steer.tiny.training import stages\n"
    "from vlm_steer.tiny.training.loop import Recipe, Run, train\n"
    "stages.Vision.images = stages.Instructions.images = stages.Language.rows = 2\n"
)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.Vision, "images", 2)
    monkeypatch.setattr(stages.Instructions, "images", 2)
    monkeypatch.setattr(stages.Language, "rows", 2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Sums over several threads may be taken in another order in another process.
    torch.set_num_threads(1)


def _run(output: Path) -> Run:
    return Run(output, torch.device("cpu"), checkpoint_every=1, workers=0)


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, size in ((stages.Vision, "images"), (stages.Instructions, "images")):
            patch.setattr(kind, size, 2)
        patch.setattr(stages.Language, "rows", 2)
        torch.set_num_threads(1)
        return train(Recipe(seed=5, steps=STEPS), _run(tmp_path_factory.mktemp("whole")))


@pytest.mark.slow
def test_run_killed_outright_resumes_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    code = SMALL + (
        f"train(Recipe(seed=5, steps={STEPS}), Run(Path({str(tmp_path)!r}), "
        "torch.device('cpu'), checkpoint_every=1, workers=0))"
    )
    checkpoint = tmp_path / loop.CHECKPOINT
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    while not (checkpoint.exists() and place(checkpoint)[:2] >= (0, 2)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed_at = place(checkpoint)
    assert resumed_at.stage < len(STEPS)
    resumed = train(Recipe(seed=5, steps=STEPS), _run(tmp_path))
    expected, found = _weights(whole), _weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [(1, 1), (3, 2)])
def test_run_stopped_in_any_stage_resumes_to_the_same_bits(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int]
) -> None:
    class Stopped(Exception):
        pass

    stored = loop.store

    def store_and_stop(path: Path, where: object, *rest: object) -> None:
        stored(path, where, *rest)
        if where[:2] == stop:
            raise Stopped

    monkeypatch.setattr(loop, "store", store_and_stop)
    with pytest.raises(Stopped):
        train(Recipe(seed=5, steps=STEPS), _run(tmp_path))
    monkeypatch.setattr(loop, "store", stored)
    expected = _weights(whole)
    found = _weights(train(Recipe(seed=5, steps=STEPS), _run(tmp_path)))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_finished_run_loads_and_other_recipe_is_refused(whole: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(whole)
    assert model.dtype == torch.float32
    assert AutoProcessor.from_pretrained(whole).tokenizer.padding_side == "left"
    with pytest.raises(ConfigError, match="empty output folder"):
        train(Recipe(seed=6, steps=STEPS), _run(whole.parent))


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    from vlm_steer.tiny.training.checkpoint import Place, store

    store(tmp_path / "c.safetensors", Place(0, 1, "{}"), torch.nn.Linear(2, 2), [])
    with pytest.raises(DataError, match="empty output folder"):
        restore(tmp_path / "c.safetensors", torch.nn.Linear(2, 2, bias=False))


def test_packed_segment_is_computed_as_if_it_stood_alone() -> None:
    processor = build_processor()
    torch.manual_seed(0)
    model = build_model(processor).eval()
    encode = processor.tokenizer.encode
    prefix = encode("USER: ")
    segments = [
        Segment(encode(q, add_special_tokens=False), encode(a, add_special_tokens=False), [1.0])
        for q, a in (("Is there a dog?", " No"), ("What color is the cup?", " Red"))
    ]
    batch = pack(prefix, [segments, segments[:1]], processor.tokenizer.pad_token_id)
    with torch.no_grad():
        packed = model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(batch.input_ids),
            attention_mask=attention_bias(batch.segments),
            position_ids=batch.positions,
        ).last_hidden_state
        for row, number in ((0, 1), (0, 2), (1, 1)):
            ids = torch.tensor(
                [prefix + segments[number - 1].question + segments[number - 1].answer]
            )
            alone = model.model.language_model(input_ids=ids).last_hidden_state[0, len(prefix) :]
            torch.testing.assert_close(
                packed[row, batch.segments[row] == number], alone, atol=1e-4, rtol=1e-4
            )


def test_packed_targets_are_the_answers_and_the_end() -> None:
    batch = pack([9], [[Segment([1, 2], [3, 4], [3.0, 0.5]), Segment([5], [6], [1.0])]], 0)
    assert batch.input_ids.tolist() == [[9, 1, 2, 3, 4, 5, 6]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 1, 2]]
    assert batch.weights.tolist() == [[0, 0, 3.0, 0.5, 0, 1.0, 0]]
    learnt = batch.weights > 0
    assert batch.targets[learnt].tolist() == [3, 4, 6]


def test_training_tokens_are_those_of_the_processor() -> None:
    from vlm_steer.tiny.scenes import render, scene

    processor = build_processor()
    stage = stages.Instructions(processor, seed=0, steps=1)
    batch = stage.batch(0)
    first = batch.text.segments[0] == 1
    ids = batch.text.input_ids[0][(batch.text.segments[0] == 0) | first]
    text = processor.decode(ids).replace("<s>", "").replace("<image>" * 64, "<image>")
    whole = processor(images=render(scene("train", 0)), text=text, return_tensors="pt")
    assert whole["input_ids"][0].tolist() == ids.tolist()


def test_only_the_stage_that_grows_sinks_looks_for_empty_patches() -> None:
    processor = build_processor()
    kinds = (stages.Projector, stages.Instructions, sinks.Sinks)
    projector, plain, growing = (kind(processor, seed=0, steps=1).batch(0) for kind in kinds)
    assert projector.is_empty.shape == plain.is_empty.shape == (2, 0)
    assert growing.is_empty.shape == (2, 64)
    assert growing.is_empty.any()
    assert not growing.is_empty.all()


def test_muon_update_is_nearly_orthogonal_whatever_the_gradient() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(24, 64))
    parameter.grad = torch.randn(24, 64) @ torch.diag(torch.logspace(-2, 2, 64))
    Muon([parameter], lr=1.0).step()
    values = torch.linalg.svdvals(parameter.detach()) / (0.2 * 64**0.5)
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_learning_rate_rises_then_falls_to_a_twentieth() -> None:
    rates = [cosine(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1, abs=0.03)
    assert rates[-1] == pytest.approx(0.05)
