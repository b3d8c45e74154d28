"""The golden cases again, in a batch with other rows, and behind left padding."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from test_golden import WRITTEN, Case, assert_matches
from torch import Tensor

# By definition without a batch axis.
NO_BATCH = {
    "concentric_rings",
    "gift_saliency",
    "laplacian_eigenvalues",
    "summed_visual_attention_ratio",
}
# Arguments and results that the rows of a batch share.
SHARED = {"visual_embeds", "direction", "anchor"}

N_PAD = 3


class Padding(NamedTuple):
    """How to put N_PAD columns of padding in front of a case."""

    inputs: Mapping[str, tuple[tuple[int, ...], float]]  # argument -> axes, fill
    outputs: Mapping[str, tuple[int, ...]]  # result -> axes to crop
    params: Callable[[dict[str, Any]], dict[str, Any]] = dict
    real: str | None = None  # argument whose length the mask of real tokens has


def _later_response(params: dict[str, Any]) -> dict[str, Any]:
    return params | {"response_start": params["response_start"] + N_PAD}


COLUMN = ((-1,), 0.0)
SQUARE = ((-2, -1), 0.0)
PADDED = {
    "act_calibrate": Padding({"weights": SQUARE}, {"weights": (-2, -1)}, real="weights"),
    "blind_tokens": Padding({"weights": COLUMN, "visual": COLUMN}, {"blind": (-1,)}),
    "boost_scores": Padding({"scores": ((-1,), -torch.inf), "visual": COLUMN}, {"scores": (-1,)}),
    "gift_fuse": Padding(
        {
            "weights": COLUMN,
            "saliency": ((-1,), 7.0),
            "visual": COLUMN,
            "query_tokens": COLUMN,
        },
        {"weights": (-1,)},
    ),
    "lookback_ratio": Padding({"weights": COLUMN, "context": COLUMN, "new": COLUMN}, {"ratio": ()}),
    "memvr_retrace": Padding(
        {"mlp_input": ((-2,), 7.0), "mlp_output": ((-2,), -7.0)},
        {"output": (-2,)},
        real="mlp_input",
    ),
    "modality_mutual_mask": Padding(
        {"visual": COLUMN, "question": COLUMN}, {"mask": (-2, -1)}, real="visual"
    ),
    "opera_penalty": Padding(
        {"weights": SQUARE, "visual": COLUMN},
        {"penalty": (), "anchor": ()},
        params=_later_response,
    ),
    "redistribute_sinks": Padding(
        {"weights": SQUARE, "sinks": COLUMN, "visual": COLUMN, "rows": COLUMN},
        {"weights": (-2, -1)},
    ),
    "sink_tokens": Padding({"hidden_states": ((-2,), 0.0)}, {"sinks": (-1,)}),
    "spin_gate": Padding({"scores": ((-1,), -torch.inf), "visual": COLUMN}, {"gate": ()}),
    "summed_visual_attention_ratio": Padding({"weights": COLUMN, "visual": COLUMN}, {"svar": ()}),
    "vdgd_logits": Padding(
        {"description_log_probs": ((-2,), -0.5)}, {"logits": ()}, real="description_log_probs"
    ),
}

CASES = WRITTEN
BATCHED = [case for case in CASES if case.function not in NO_BATCH]
PADDABLE = [case for case in CASES if case.function in PADDED]


def case_name(value: object) -> str | None:
    return value.name if isinstance(value, Case) else None


@pytest.mark.parametrize("case", BATCHED, ids=case_name)
def test_neighbours_in_the_batch_change_nothing(case: Case) -> None:
    def with_neighbour(name: str, tensor: Tensor) -> Tensor:
        if name in SHARED:
            return tensor
        return torch.cat([tensor, tensor.roll(1, dims=-1), tensor])

    batch = case.run(**{name: with_neighbour(name, t) for name, t in case.inputs.items()})
    for name, expected in case.outputs.items():
        result = batch[name]
        size = expected.shape[0]
        assert result.shape == (3 * size, *expected.shape[1:])
        assert_matches(result[:size], expected, atol=case.atol)
        assert_matches(result[2 * size :], expected, atol=case.atol)


def pad_left(tensor: Tensor, axes: tuple[int, ...], fill: float) -> Tensor:
    for axis in axes:
        shape = list(tensor.shape)
        shape[axis] = N_PAD
        tensor = torch.cat([torch.full(shape, fill, dtype=tensor.dtype), tensor], dim=axis)
    return tensor


@pytest.mark.parametrize("case", PADDABLE, ids=case_name)
def test_left_padding_changes_nothing(case: Case) -> None:
    plan = PADDED[case.function]
    changed: dict[str, Any] = plan.params(case.params)
    for name, (axes, fill) in plan.inputs.items():
        changed[name] = pad_left(case.inputs[name], axes, fill)
    if plan.real is not None:
        (axis, *_), _ = plan.inputs[plan.real]
        length = case.inputs[plan.real].shape[axis]
        real = torch.arange(N_PAD + length) >= N_PAD
        changed["mask"] = real.expand(case.inputs[plan.real].shape[0], -1)
    results = case.run(**changed)
    for name, expected in case.outputs.items():
        cropped = results[name]
        for axis in plan.outputs[name]:
            cropped = cropped.narrow(axis, N_PAD, expected.shape[axis])
        assert_matches(cropped, expected, atol=case.atol)


def test_every_function_with_a_mask_over_columns_is_padded() -> None:
    column_masks = {"visual", "sinks", "context", "new", "query_tokens", "rows", "question"}
    masked = {case.function for case in CASES if column_masks & case.inputs.keys()}
    assert masked <= PADDED.keys()
