"""The golden cases in other precisions: fp32 (or fp64) inside, input dtype out."""

import pytest
import torch
from test_golden import WRITTEN, Case, assert_matches
from torch import Tensor

# Results that measure something keep the precision of the computation.
STATISTICS = {
    "alpha",
    "divergence",
    "eigenvalues",
    "penalty",
    "ratio",
    "saliency",
    "svar",
}

CASES = WRITTEN
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_fp32_inside_and_itself_outside(case: Case, dtype: torch.dtype) -> None:
    half = cast(case.inputs, dtype)
    expected = case.run(**cast(half, torch.float32))
    for name, result in case.run(**half).items():
        assert not result.isnan().any()
        if result.is_floating_point():
            assert result.dtype == (torch.float32 if name in STATISTICS else dtype)
        assert torch.equal(result, expected[name].to(result.dtype))


@every_case
def test_double_precision_stays_double_precision(case: Case) -> None:
    for name, result in case.run(**cast(case.inputs, torch.float64)).items():
        expected = case.outputs[name]
        if result.is_floating_point():
            assert result.dtype == torch.float64
            assert_matches(result, expected.double(), atol=case.atol)
        else:
            assert_matches(result, expected, atol=0)
