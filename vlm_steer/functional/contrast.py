"""Comparing two streams of logits (VCD, ICD, AvisC, AGLA, PAI guidance, M3ID, DeCoRe).

Every function takes raw logits or log-probabilities `[batch, vocabulary]`, computes in fp32 and
returns the input dtype. A token that the second stream excludes (`-inf`) is taken to be one about
which it has no opinion: the first stream decides alone, where plain arithmetic would give NaN or
+inf. A token that the first stream excludes stays excluded.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from vlm_steer.functional._numeric import upcast


def plausibility_mask(logits: Tensor, *, beta: float) -> Tensor:
    """Marks the tokens whose probability is at least `beta` times the largest one (APC).

    `l_j >= log(beta) + max(l)` (contrastive decoding, arXiv 2210.15097, in the form that VCD and
    its followers use).

    Args:
        logits: `[..., vocabulary]` float.
        beta: in [0, 1]; 0 keeps everything, 1 only the maximum.

    Returns:
        bool, shape of `logits`. The largest token is always kept.
    """
    values = upcast(logits)
    cutoff = (math.log(beta) if beta > 0 else -math.inf) + values.amax(-1, keepdim=True)
    return ~(values < cutoff)


def contrast_logits(
    positive: Tensor,
    negative: Tensor,
    *,
    alpha: float,
    beta: float,
    form: Literal["subtract", "add"] = "subtract",
) -> Tensor:
    """Combines the logits of two views of the same prompt under a plausibility mask.

    `subtract`: `(1 + alpha) * positive - alpha * negative` (VCD, arXiv 2311.16922, eq. 3; shared
    by ICD, AvisC, SID and LQCD). `add`: `positive + alpha * negative`, where the second view
    helps (AGLA, arXiv 2406.12718). Then `-inf` where the positive logit is below
    `log(beta) + max(positive)`.

    Args:
        positive: logits with the true image, `[batch, vocabulary]`.
        negative: logits of the other view.
        alpha: weight of the other view, >= 0.
        beta: plausibility, in [0, 1]; 0 masks nothing. `alpha = beta = 0` is identity, bitwise.
        form: how the views combine.

    Returns:
        Logits, shape and dtype of `positive`.
    """
    first = upcast(positive)
    second = _with_opinion(upcast(negative), first)
    if form == "subtract":
        combined = (1 + alpha) * first - alpha * second
    else:
        combined = first + alpha * second
    return _restrict(combined, first, beta=beta).to(positive.dtype)


def _with_opinion(other: Tensor, reference: Tensor) -> Tensor:
    """Lets the second stream agree with the first wherever it excludes a token."""
    return torch.where(other == -math.inf, reference, other)


def _restrict(combined: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Excludes what the reference finds implausible or already excludes."""
    kept = plausibility_mask(reference, beta=beta) & (reference != -math.inf)
    return combined.masked_fill(~kept, -math.inf)
