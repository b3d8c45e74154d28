"""ICD and LQCD: how they join other contrasts, and which options mean nothing."""

import pytest
import torch

import vlm_steer
from tests.contract.test_contract import generate, two_rows
from tests.families import zoo
from vlm_steer.config import resolve
from vlm_steer.engine.hooks import LogitsAt
from vlm_steer.errors import ConfigError
from vlm_steer.methods.icd import ICD
from vlm_steer.methods.lqcd import LQCD
from vlm_steer.methods.vcd import VCD

RAW, NOISED, DISTURBED = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(0))


def seen(**branches: torch.Tensor) -> LogitsAt:
    return LogitsAt(raw=RAW, branches=branches, step=0, plan=None, prepared=None)


def test_with_vcd_the_official_sum_doubles_the_scale_and_the_default_keeps_it() -> None:
    after_vcd = VCD(alpha=1.0).logits(RAW, seen(noised=NOISED))
    both = seen(disturbed=DISTURBED)
    summed = ICD(alpha=1.0, combine="sum").logits(after_vcd, both)
    convex = ICD(alpha=1.0).logits(after_vcd, both)
    torch.testing.assert_close(summed, 4 * RAW - NOISED - DISTURBED)
    torch.testing.assert_close(convex, 3 * RAW - NOISED - DISTURBED)


def test_alone_both_ways_of_combining_are_the_contrast_itself() -> None:
    at = seen(disturbed=DISTURBED)
    torch.testing.assert_close(ICD().logits(RAW, at), 2 * RAW - DISTURBED)
    assert torch.equal(ICD().logits(RAW, at), ICD(combine="sum").logits(RAW, at))


def test_the_preset_with_vcd_sums() -> None:
    vcd, icd = resolve("icd_vcd")
    assert (vcd.name, icd.name, icd.combine) == ("vcd", "icd", "sum")


def test_two_contrasts_act_together_under_greedy_decoding_and_beams() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    spec = ["vcd", {"method": "icd", "disturbance_ids": [30, 40]}]
    for options in ({}, {"num_beams": 3}):
        base = generate(family, batch, **options)
        with vlm_steer.steer(family.model, "vcd"):
            alone = generate(family, batch, **options)
        with vlm_steer.steer(family.model, spec):
            together = generate(family, batch, **options)
        assert not torch.equal(together, base)
        assert not torch.equal(together, alone)


@pytest.mark.parametrize(
    ("cls", "options", "word"),
    [
        (ICD, {"disturbance": " "}, "disturbance"),
        (ICD, {"disturbance_ids": ()}, "disturbance_ids"),
        (ICD, {"disturbance": "x", "disturbance_ids": (1,)}, "disturbance_ids are given"),
        (ICD, {"alpha": 0.0, "where": "start"}, "alpha is 0"),
        (LQCD, {"leading": ""}, "leading"),
        (LQCD, {"tail": -1}, "tail"),
        (LQCD, {"where": "instruction", "tail": 2}, "where is not end"),
        (LQCD, {"leading": "x", "leading_ids": (1,)}, "leading_ids are given"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    cls: type, options: dict[str, object], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        cls(**options)
