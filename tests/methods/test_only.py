"""ONLY on planted cases."""

import math

import pytest
import torch

from tests.contract.test_contract import two_rows
from tests.families import zoo
from tests.methods.streams import recorded
from vlm_steer.engine.hooks import LogitsAt
from vlm_steer.errors import ConfigError
from vlm_steer.functional import text_visual_entropy
from vlm_steer.methods.only import ONLY
from vlm_steer.methods.vcd import VCD


def test_the_ratio_compares_how_widely_a_head_spreads() -> None:
    text = torch.tensor([[True, True, False, False, False, False]])
    weights = torch.tensor(
        [[0.25, 0.25, 0.5, 0, 0, 0], [0.1, 0.1, 0.2, 0.2, 0.2, 0.2], [0.5, 0, 0.25, 0.25, 0, 0]]
    )
    ratio = text_visual_entropy(weights[None, :, None], text, ~text)[0, :, 0]
    assert ratio[0] > 1e5  # sure about the image
    torch.testing.assert_close(ratio[1], torch.tensor(math.log(2) / math.log(4)))
    assert ratio[2] == 0  # sure about the text


def test_streams_that_agree_support_each_other_and_others_are_contrasted() -> None:
    raw = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    other = torch.tensor([[2.0, 1.0, 0.1], [0.0, 1.0, 2.0]])
    at = LogitsAt(raw=raw, branches={"textual": other}, step=0, plan=None, prepared=None)
    moved = ONLY().logits(raw, at)
    torch.testing.assert_close(moved[0], raw[0] + 3 * other[0])
    torch.testing.assert_close(moved[1], 2 * raw[1] - other[1])


@pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")
def test_heads_are_switched_off_in_the_second_stream_alone() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    _, seen = recorded(family, ONLY(), batch, max_new_tokens=1)
    _, plain = recorded(family, VCD(), batch, max_new_tokens=1)
    torch.testing.assert_close(seen[0][None], plain[0][None], atol=1e-4, rtol=1e-4)
    assert (seen[0]["textual"] - seen[0][None]).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"threshold": 3.0}, {"beta": 2.0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ONLY(**options)
