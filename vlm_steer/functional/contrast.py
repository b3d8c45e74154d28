"""Comparing two streams of logits (VCD, ICD, AvisC, AGLA, PAI guidance, M3ID, DeCoRe).

Every function takes raw logits or log-probabilities `[batch, vocabulary]`, computes in fp32 and
returns the input dtype. A token that the second stream excludes (`-inf`) is taken to be one about
which it has no opinion: the first stream decides alone, where plain arithmetic would give NaN or
+inf. A token that the first stream excludes stays excluded.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm_steer.functional._numeric import upcast

_LARGEST_EXPONENT = 40.0  # a larger weight would leave float32


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

    `subtract`: `(1 + alpha) * positive - alpha * negative` (VCD, arXiv 2311.16922; shared
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


def guidance_logits(
    conditional: Tensor, unconditional: Tensor, *, gamma: float, beta: float
) -> Tensor:
    """Amplifies what the image adds to the log-probabilities (PAI's logit refinement).

    `gamma * (lc - lu) + lu` with lc, lu the log-probabilities with and without the image
    (arXiv 2407.21771), then `-inf` where `lc < log(beta) + max(lc)`. As in the official
    code, `gamma = 1` returns lc and skips the mask.

    Args:
        conditional: logits with the image, `[batch, vocabulary]`.
        unconditional: logits without it.
        gamma: guidance, >= 1; 1 disables (authors: 1.1; default of their script: 2).
        beta: plausibility, in [0, 1].

    Returns:
        Logits, shape and dtype of `conditional`.
    """
    first = upcast(conditional).log_softmax(-1)
    if gamma == 1:
        return first.to(conditional.dtype)
    second = _with_opinion(upcast(unconditional).log_softmax(-1), first)
    combined = gamma * (first - second) + second
    return _restrict(combined, first, beta=beta).to(conditional.dtype)


def m3id_logits(
    conditional: Tensor,
    unconditional: Tensor,
    *,
    step: int,
    lam: float,
    max_weight: float | None = None,
) -> Tensor:
    """Amplifies what the image adds, more and more as the text grows (M3ID).

    `lc + w * (lc - lu)` on log-probabilities, `w = (1 - g) / g`, `g = exp(-lam * step)`
    (arXiv 2403.14003). The paper applies it only where the model is unsure
    (`max(lc) < log(alpha)`); the only public code, AvisC's port, has no such gate, and neither
    has this function: gate, or mask with `plausibility_mask`, outside. The weight has no bound
    (11.2 at step 125 for lam 0.02) unless `max_weight` sets one; past 1e17 it stops growing, where
    the contrast alone decides anyway.

    Args:
        conditional: logits with the image, `[batch, vocabulary]`.
        unconditional: logits without it.
        step: number of the token being generated, from 1.
        lam: rate at which the image is forgotten, per token, >= 0; 0 disables.
        max_weight: upper bound of the weight, >= 0; None for none.

    Returns:
        Log-probabilities shifted by the contrast, shape and dtype of `conditional`.
    """
    weight = math.expm1(min(lam * step, _LARGEST_EXPONENT))
    if max_weight is not None:
        weight = min(weight, max_weight)
    first = upcast(conditional).log_softmax(-1)
    second = _with_opinion(upcast(unconditional).log_softmax(-1), first)
    combined = first + weight * (first - second)
    return _restrict(combined, first, beta=0).to(conditional.dtype)


class EntropyContrast(NamedTuple):
    """A contrast whose weight is the entropy of the base distribution.

    Attributes:
        alpha: fp32 `[batch]`, entropy in nats.
        logits: `[batch, vocabulary]`, dtype of the base logits.
    """

    alpha: Tensor
    logits: Tensor


def decore_logits(base: Tensor, masked: Tensor) -> EntropyContrast:
    """Contrasts the model with itself without its retrieval heads, by uncertainty (DeCoRe).

    `(1 + alpha) * log p_base - alpha * log p_masked`, alpha the entropy of p_base in nats
    (arXiv 2410.18860). No plausibility mask.

    Args:
        base: logits of the unchanged model, `[batch, vocabulary]`.
        masked: logits with the retrieval heads masked.
    """
    first = upcast(base).log_softmax(-1)
    second = _with_opinion(upcast(masked).log_softmax(-1), first)
    alpha = torch.special.entr(first.exp()).sum(-1)
    weight = alpha.unsqueeze(-1)
    combined = (1 + weight) * first - weight * second
    logits = _restrict(combined, first, beta=0)
    return EntropyContrast(alpha=alpha, logits=logits.to(base.dtype))


def add_change(logits: Tensor, raw: Tensor, changed: Tensor) -> Tensor:
    """Lets several contrasts act on one prediction: adds what one made of the raw logits.

    `logits + (changed - raw)`. Contrasts that act one after the other so become
    `(1 + sum_i alpha_i) * l - sum_i alpha_i * n_i`, in any order. A token that the raw logits or
    the contrast exclude stays excluded.

    Args:
        logits: what the methods so far made of the raw logits, `[batch, vocabulary]`.
        raw: the logits of the user's stream.
        changed: what this method made of them.

    Returns:
        Logits, shape and dtype of `logits`.
    """
    new, old = upcast(changed), upcast(raw)
    is_out = (new == -math.inf) | (old == -math.inf)
    added = upcast(logits) + torch.where(is_out, 0.0, new - old)
    return added.masked_fill(is_out, -math.inf).to(logits.dtype)


def _with_opinion(other: Tensor, reference: Tensor) -> Tensor:
    """Lets the second stream agree with the first wherever it excludes a token."""
    return torch.where(other == -math.inf, reference, other)


def _restrict(combined: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Excludes what the reference finds implausible or already excludes."""
    kept = plausibility_mask(reference, beta=beta) & (reference != -math.inf)
    return combined.masked_fill(~kept, -math.inf)
