"""ACT where its effect is known in advance, and the file of its calibrated heads."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.families import zoo
from tests.methods.views import GENERATED, IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer.calibration import write_calibration
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import ConfigError
from vlm_steer.functional import act_calibrate
from vlm_steer.methods.act import ACT

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

KINDS = [SYSTEM] * 3 + [IMAGE] * 6 + [INSTRUCTION] * 5
N = len(KINDS)


def square(heads: int = 4) -> Tensor:
    """Causal attention ``[1, heads, N, N]`` with a sink in the image and one in the text."""
    scores = torch.randn(1, heads, N, N)
    scores[..., [0, 5, 10]] += 3
    closed = torch.ones(N, N, dtype=torch.bool).triu(1)
    return scores.masked_fill(closed, -torch.inf).softmax(dim=-1)


def calibrated(method: ACT, weights: Tensor, heads: tuple[int, ...] | None = None) -> Tensor:
    plan = None if heads is None else {0: heads}
    at = view(KINDS, rows=N, plan=plan, prompt_rows=N)
    tally = method.tally(weights, at)
    return method.weights(weights, view(KINDS, rows=N, plan=plan, tally=tally))


@pytest.mark.parametrize("heads", [None, (0, 3)])
def test_a_prompt_is_calibrated_as_the_golden_function_does(heads: tuple[int, ...] | None) -> None:
    weights = square()
    new = calibrated(ACT(threshold=0.1, relative=False), weights, heads)
    expected = act_calibrate(weights, heads=heads or range(4), beta=0.4, theta=0.1)
    torch.testing.assert_close(new, expected)
    assert not torch.allclose(new, weights)


def test_the_relative_threshold_is_a_share_of_the_length_of_the_prompt() -> None:
    weights = square()
    relative = calibrated(ACT(threshold=2.0), weights)
    constant = calibrated(ACT(threshold=2.0 / N, relative=False), weights)
    assert torch.equal(relative, constant)


def test_a_decoded_row_keeps_its_sum_and_the_sinks_of_the_prompt() -> None:
    method = ACT(threshold=0.1, relative=False)
    tally = method.tally(square(), view(KINDS, rows=N))
    row = torch.rand(1, 4, 1, N + 1).softmax(dim=-1)
    row[..., -1] = 0.5  # the generated token itself gets much, and is no sink for that
    row = row / row.sum(dim=-1, keepdim=True)
    new = method.weights(row, view([*KINDS, GENERATED], tally=tally, on_keys=on_one_more))
    torch.testing.assert_close(new.sum(dim=-1), torch.ones(1, 4, 1))
    factor = (new / row)[0, :, 0]
    assert (factor[:, -1] > 1).all()
    torch.testing.assert_close(factor[:, [5, 10]], torch.full((4, 2), 0.4))


def on_one_more(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, 1))


@pytest.mark.parametrize(("where", "lowered"), [("image", [5]), ("text", [10])])
def test_sinks_can_be_those_of_the_image_or_of_the_text(where: str, lowered: list[int]) -> None:
    weights = square()
    new = calibrated(ACT(threshold=0.1, relative=False, where=where), weights)
    is_lower = (new < weights).any(dim=(0, 1, 2))
    assert is_lower.nonzero().flatten().tolist() == lowered


def test_the_image_alone_can_receive() -> None:
    weights = square()
    new = calibrated(ACT(threshold=0.1, relative=False, receivers="image"), weights)
    is_higher = (new > weights).any(dim=(0, 1, 2))
    assert is_higher.nonzero().flatten().tolist() == [3, 4, 6, 7, 8]


def test_rows_of_padding_count_for_nothing() -> None:
    weights = torch.nn.functional.pad(square(), (2, 0, 2, 0))
    weights[:, :, :2] = 1 / (N + 2)
    at = view([0, 0, *KINDS], rows=N + 2)
    at = view([0, 0, *KINDS], rows=N + 2, is_row=~at.columns.is_padding, row_kinds=at.columns.kinds)
    method = ACT(threshold=1.5)
    padded = method._sinks(method.tally(weights, at))
    alone = method._sinks(method.tally(weights[:, :, 2:, 2:], view(KINDS, rows=N)))
    assert torch.equal(padded[..., 2:], alone)
    assert not padded[..., :2].any()


def heads_file(path: Path, family: str = "llava", **changes: object) -> Path:
    info = inspect_model(zoo.load(family).model)
    write_calibration(path, "act", info, {"heads": {"0": [1], "1": [0, 2]}})
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_heads_come_from_the_file_of_the_model(tmp_path: Path) -> None:
    path = heads_file(tmp_path / "heads.json")
    spec = {"method": "act", "head_list": str(path), "layers": "all"}
    with vlm_steer.steer(zoo.load("llava").model, spec) as steering:
        (status,) = steering.status()["methods"]
    assert status["layers"] == [0, 1]
    assert status["notes"] == ["3 heads in 2 layers"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "vsv"}, "is a file for vsv"),
        ({"version": 99}, "version 99"),
        ({"model": {"family": "other", "layers": 80}}, "made for another model: family other"),
        ({"heads": {"0": [99]}}, "outside this model"),
        ({"heads": [1]}, "holds no heads by layer"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_what_to_do(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = heads_file(tmp_path / "heads.json", **changes)
    with pytest.raises(ConfigError, match=message):
        vlm_steer.attach(zoo.load("llava").model, {"method": "act", "head_list": str(path)})


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_its_own_heads_alone_are_computed_to_the_same_effect(family: str) -> None:
    loaded = zoo.load(family)
    heads = {0: (0, 3), 1: (2,)}
    act = {"method": "act", "head_list": heads, "threshold": 1.01, "layers": "all"}
    batch = loaded.batch([loaded.inputs(6), loaded.inputs(9, seed=1)])
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    logits = {}
    # An observer needs the rows of all heads.
    for name, spec in (("none", None), ("own", act), ("all", [act, "lookback_ratio"])):
        with vlm_steer.steer(loaded.model, spec):
            found = loaded.model.generate(**batch, **options, output_logits=True)
        logits[name] = torch.stack(found.logits)
    torch.testing.assert_close(logits["own"], logits["all"], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits["own"], logits["none"], atol=1e-5)


def test_a_missing_or_broken_file_says_how_to_make_one(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    for _ in range(2):
        with pytest.raises(ConfigError, match="vlm-steer calibrate act"):
            vlm_steer.attach(zoo.load("llava").model, ACT(head_list=str(path)))
        path.write_text("{")


def test_every_head_is_tried_alone_and_those_that_help_are_kept() -> None:
    info = inspect_model(zoo.load("llava").model)
    method = ACT(layers=(1, 3), beta=0.2)
    tried = method.candidates(info)
    assert len(tried) == 2 * zoo.HEADS
    assert {type(t) for t in tried} == {ACT}
    assert {t.beta for t in tried} == {0.2}
    gains = [0.0] * len(tried)
    gains[1], gains[2], gains[zoo.HEADS] = 0.1, -0.1, 0.05
    assert method.calibrated(tried, gains) == {"heads": {"1": [1], "2": [0]}}
    with pytest.raises(ConfigError, match="none of"):
        method.calibrated(tried, [0.0] * len(tried))


@pytest.mark.parametrize(
    ("option", "value"),
    [("beta", 1.2), ("threshold", 0.0), ("head_list", {})],
)
def test_an_option_out_of_range_is_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        ACT(**{option: value})


def test_a_threshold_of_one_and_more_needs_the_length_of_the_prompt() -> None:
    with pytest.raises(ConfigError, match="below 1 when relative is false"):
        ACT(threshold=5.0, relative=False)


def test_other_heads_in_a_later_turn_do_not_take_over_what_the_former_received() -> None:
    loaded = zoo.load("llava")
    act = {"method": "act", "threshold": 1.01, "layers": "all", "head_list": {0: (0, 3)}}
    batch = loaded.batch([loaded.inputs(6)])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    found = []
    for update in (True, False):
        with vlm_steer.steer(loaded.model, act) as steering:
            first = loaded.model.generate(**batch, **options)
            cache, ids = first.past_key_values, first.sequences
            ids = torch.cat([ids, batch["input_ids"][:, -4:]], dim=1)
            steering.update(head_list={0: (1, 2)})
            if not update:
                cache = copy.deepcopy(cache)  # of which the steering knows nothing
            second = loaded.model.generate(
                input_ids=ids, past_key_values=cache, **options, output_logits=True
            )
        found.append(torch.stack(second.logits))
    assert torch.equal(*found)
