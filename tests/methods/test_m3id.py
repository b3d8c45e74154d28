"""M3ID where its effect is known in advance."""

import math

import pytest
import torch
from torch import Tensor

from vlm_steer.engine.hooks import LogitsAt
from vlm_steer.errors import ConfigError
from vlm_steer.methods.m3id import M3ID

UNSURE = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.0]])
SURE = torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0]])
TEXT_ONLY = torch.tensor([[2.0, 0.0, 0.0, 0.0, 0.0]])


def seen(raw: Tensor, step: int) -> LogitsAt:
    branches = {"text_only": TEXT_ONLY.expand_as(raw)}
    return LogitsAt(raw=raw, branches=branches, step=step, plan=None, prepared=None)


def test_the_weight_grows_with_the_number_of_the_token() -> None:
    method = M3ID(lam=0.02, confidence=1.0)
    for step, weight in ((0, 0.020201), (9, 0.221403), (39, 1.225541)):
        moved = method.logits(UNSURE, seen(UNSURE, step)).log_softmax(-1)
        difference = UNSURE.log_softmax(-1) - TEXT_ONLY.log_softmax(-1)
        expected = (UNSURE + weight * difference).log_softmax(-1)
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


def test_a_sure_prediction_is_left_alone_row_by_row() -> None:
    raw = torch.cat([UNSURE, SURE])
    assert UNSURE.softmax(-1).max() < 0.3 < SURE.softmax(-1).max()
    moved = M3ID().logits(raw, seen(raw, 30))
    assert not torch.equal(moved[0], raw[0])
    assert torch.equal(moved[1], raw[1])


def test_the_weight_is_bounded_when_asked_and_finite_always() -> None:
    bounded = M3ID(confidence=1.0, max_weight=1.0).logits(UNSURE, seen(UNSURE, 10**6))
    at_one = M3ID(confidence=1.0, lam=math.log(2)).logits(UNSURE, seen(UNSURE, 0))
    torch.testing.assert_close(bounded, at_one)
    assert M3ID(confidence=1.0).logits(UNSURE, seen(UNSURE, 10**6)).isfinite().all()


def test_the_mask_alone_needs_no_extra_stream() -> None:
    method = M3ID(lam=0.0, beta=0.1)
    assert method.branches() == ()
    assert method.logits(UNSURE, seen(UNSURE, 0)) is UNSURE
    assert method.plausible(seen(SURE, 0)).tolist() == [[True, False, False, False, False]]


@pytest.mark.parametrize("options", [{"lam": -1.0}, {"confidence": 0.0}, {"max_weight": 0.0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        M3ID(**options)
