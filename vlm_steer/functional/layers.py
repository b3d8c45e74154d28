"""Mixing the logits of early layers into those of the last one (DoLa, DeCo, SLA).

`final` is `[batch, vocabulary]`, `early` is `[batch, layers, vocabulary]`; both are finite logits
of the same output head. Everything is chosen per row and computed in fp32; the result has the
dtype of `final`.
"""

from typing import Literal

import torch
from torch import Tensor

from vlm_steer.functional._numeric import divergence_of, upcast
from vlm_steer.functional.contrast import plausibility_mask


def dola_logits(
    final: Tensor,
    early: Tensor,
    *,
    relative_top: float,
    divergence: Literal["kl_m", "jsd"] = "kl_m",
) -> Tensor:
    """Contrasts the last layer with the early layer that differs most from it (DoLa).

    `log p - log q_l` where `p >= relative_top * max(p)`, else `-inf`; p the final distribution,
    q_l that of the early layer with the largest divergence (arXiv 2309.03883). With
    `M = (p + q) / 2` the paper's Jensen-Shannon divergence (`jsd`) is
    `1/2 [KL(p || M) + KL(q || M)]`; the official code and transformers swap the arguments and
    compute `1/2 [KL(M || p) + KL(M || q)]` (`kl_m`), and choose one layer for the whole batch
    where we choose per row.

    Args:
        final: logits of the last layer.
        early: logits of the candidate layers, without the final norm in the official code.
        relative_top: plausibility, in [0, 1]; 0 masks nothing.
        divergence: what "differs most" means.

    Returns:
        Contrasted log-probabilities, `[batch, vocabulary]`.
    """
    log_p = upcast(final).log_softmax(-1)
    log_q = upcast(early).log_softmax(-1)
    distance = divergence_of(log_p.unsqueeze(1), log_q, divergence)
    premature = _take_layer(log_q, distance.argmax(-1))
    kept = plausibility_mask(log_p, beta=relative_top)
    return (log_p - premature).masked_fill(~kept, -torch.inf).to(final.dtype)


def deco_logits(final: Tensor, early: Tensor, *, alpha: float, top_p: float, top_k: int) -> Tensor:
    """Adds the logits of the early layer that is surest of a plausible token (DeCo).

    Candidates are the `top_k` largest final probabilities, cut where their sum reaches `top_p`.
    The layer l* with the largest early probability w of any candidate gives
    `final + alpha * w * early[l*]`; other tokens get `-inf` (arXiv 2410.11779).

    Args:
        final: logits of the last layer.
        early: logits of the candidate layers, after the final norm.
        alpha: strength, >= 0; 0 leaves the candidates as they are (authors: 0.6).
        top_p: in (0, 1].
        top_k: >= 1.

    Returns:
        Corrected logits, `[batch, vocabulary]`.
    """
    last, before = upcast(final), upcast(early)
    candidates = deco_candidates(last, top_p=top_p, top_k=top_k)
    surest = before.softmax(-1).masked_fill(~candidates.unsqueeze(1), 0).amax(-1)
    confidence, layer = surest.max(-1, keepdim=True)
    corrected = last + alpha * confidence * _take_layer(before, layer.squeeze(-1))
    return corrected.masked_fill(~candidates, -torch.inf).to(final.dtype)


def deco_candidates(final: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """Marks the tokens that DeCo chooses among.

    Args:
        final: logits of the last layer, `[batch, vocabulary]`.
        top_p: their probabilities end where their sum reaches this; above 0, a bound above 1
            never ends them.
        top_k: at most this many, >= 1.

    Returns:
        bool, shape of `final`. The largest token is always kept.
    """
    top = upcast(final).softmax(-1).topk(min(top_k, final.shape[-1]), dim=-1)
    n_before = (top.values.cumsum(-1) < top_p).sum(-1, keepdim=True)
    rank = torch.arange(top.values.shape[-1], device=final.device)
    candidates = torch.zeros_like(final, dtype=torch.bool)
    return candidates.scatter(-1, top.indices, rank <= n_before)


def early_logit_mix(final: Tensor, early: Tensor, *, gamma: float) -> Tensor:
    """Mixes the mean logits of early layers into the final ones (VISTA's self-logits augmentation).

    `gamma * mean_l(early_l) + (1 - gamma) * final` (arXiv 2502.03628).

    Args:
        final: logits of the last layer.
        early: logits of the layers to mix in, without the final norm in the official code.
        gamma: weight of the early layers, in [0, 1]; 0 is identity, bitwise (authors: 0.3).

    Returns:
        Mixed logits, `[batch, vocabulary]`.
    """
    return (gamma * upcast(early).mean(1) + (1 - gamma) * upcast(final)).to(final.dtype)


def _take_layer(per_layer: Tensor, layer: Tensor) -> Tensor:
    """Picks one layer per row of `[batch, layers, vocabulary]`, given by `[batch]`."""
    index = layer[:, None, None].expand(-1, 1, per_layer.shape[-1])
    return per_layer.gather(1, index).squeeze(1)
