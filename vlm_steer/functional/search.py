"""Drawing and scoring candidates while searching (OPERA, VDGD, MVP, guided decoding)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm_steer.functional._numeric import masked_sum, safe_divide, upcast

_COLUMN_FACTOR = 1e-7  # keeps the products of the official code within fp16


class OverTrustPenalty(NamedTuple):
    """How much each candidate over-trusts a summary token.

    Attributes:
        penalty: fp32 `[beams, candidates]`, to be subtracted from the candidate's logit.
        anchor: int64 `[beams * candidates]`, the column of each candidate's strongest pattern,
            counted from the start of the response. The location that OPERA may roll back to is
            its mode, first over the candidates, then over the beams of one sample.
    """

    penalty: Tensor
    anchor: Tensor


def opera_penalty(
    weights: Tensor,
    visual: Tensor,
    *,
    scale: float,
    response_start: int,
    bonus_length: int = 10,
) -> OverTrustPenalty:
    """Scores the knowledge-aggregation pattern in the attention of each candidate (OPERA).

    Rows are normalised; in the block of the response (R tokens) each column gets
    `phi_j = 1e-7 * prod_{i >= j} scale * A_ij`, and the penalty is `max_j phi_j`
    (arXiv 2311.17911). While R <= 10 the official code gives minus the attention of the last row
    to the image instead, which is not in the paper's formula. The code computes in fp16; we
    compute in fp32.

    Args:
        weights: attention of the last layer after a maximum over heads,
            `[beams, candidates, key, key]` float, causal.
        visual: bool `[beams, key]`.
        scale: sigma, > 0 (authors: 50).
        response_start: first column of the response, in `[0, key)`.
        bonus_length: longest response that gets the image bonus, in tokens; 0 for the paper's
            formula throughout.
    """
    a = upcast(weights)
    a = safe_divide(a, a.sum(-1, keepdim=True), otherwise=0.0)
    response = scale * a[..., response_start:, response_start:]
    size = response.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=a.device).tril()
    column_scores = _COLUMN_FACTOR * torch.where(below, response, 1.0).prod(-2)
    strongest, column = column_scores.max(-1)
    penalty = strongest if size > bonus_length else -masked_sum(a[..., -1, :], visual[:, None, :])
    return OverTrustPenalty(penalty=penalty, anchor=column.flatten())


def draw_tokens(scores: Tensor, waiting: Tensor) -> Tensor:
    """Draws a token from each row's distribution, with the randomness handed in.

    The token whose waiting time divided by its probability is shortest is an exact draw, so the
    same numbers give the same tokens, whatever else is in the batch.

    Args:
        scores: unnormalised log-probabilities, `[batch, vocabulary]` float; `-inf` is never drawn.
        waiting: independent draws of the unit exponential distribution, > 0, broadcastable to
            `scores`.

    Returns:
        int64 `[batch]`.
    """
    return (upcast(scores) - upcast(waiting).log()).argmax(-1)


def first_lowest(values: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """Returns the place of the lowest value, the first of those that are equally low.

    Args:
        values: `[..., candidates]` float.
        tolerance: differences that count as none, >= 0.

    Returns:
        int64 `[...]`.
    """
    values = upcast(values)
    is_lowest = values <= values.amin(-1, keepdim=True) + tolerance
    place = torch.arange(values.shape[-1], device=values.device)
    return torch.where(is_lowest, place, values.shape[-1]).amin(-1)


def described_support(
    log_probs: Tensor,
    *,
    reduce: Literal["min", "mean", "sum"] = "min",
    mask: Tensor | None = None,
) -> Tensor:
    """Returns how well each token of the vocabulary is supported by a description (VDGD).

    `-reduce_j KL(onehot_i || p_j) = -reduce_j(-log p_j(i))` for token i over the description
    tokens j (arXiv 2405.15683): one vector, whatever is generated.

    Args:
        log_probs: log-probabilities with which the description was written,
            `[batch, description, vocabulary]` float.
        reduce: over the description tokens.
        mask: bool `[batch, description]`, real description tokens, at least one per row; None
            for all.

    Returns:
        fp32 `[batch, vocabulary]`, at most 0.
    """
    divergence = -upcast(log_probs)
    real = torch.ones_like(divergence[..., 0], dtype=torch.bool) if mask is None else mask
    column = real.unsqueeze(-1)
    if reduce == "min":
        return -divergence.masked_fill(~column, torch.inf).amin(1)
    total = divergence.masked_fill(~column, 0).sum(1)
    return -total / column.sum(1) if reduce == "mean" else -total


def vdgd_logits(
    logits: Tensor,
    description_log_probs: Tensor,
    *,
    top_p: float,
    temperature: float,
    reduce: Literal["min", "mean", "sum"] = "min",
    mask: Tensor | None = None,
) -> Tensor:
    """Scores the plausible tokens by how well a description of the image supports them (VDGD).

    Inside the nucleus of the logits (after `temperature`), token i gets
    `-reduce_j KL(onehot_i || p_j) = -reduce_j(-log p_j(i))` over the description tokens j;
    outside it `-inf` (arXiv 2405.15683). The official code divides the divergence by the
    vocabulary size, which makes the scores nearly uniform; we do not.

    Args:
        logits: `[batch, vocabulary]` float.
        description_log_probs: log-probabilities with which the description was written,
            `[batch, description, vocabulary]`; they do not change from step to step.
        top_p: nucleus, in (0, 1] (authors: 0.5).
        temperature: of the nucleus, > 0 (authors: 0.5).
        reduce: over the description tokens (code: min; read-me: mean).
        mask: bool `[batch, description]`, real description tokens, at least one per row; None
            for all.

    Returns:
        Scores, shape and dtype of `logits`.
    """
    support = described_support(description_log_probs, reduce=reduce, mask=mask)
    kept = nucleus(upcast(logits) / temperature, top_p=top_p)
    return support.masked_fill(~kept, -torch.inf).to(logits.dtype)


def nucleus(logits: Tensor, *, top_p: float) -> Tensor:
    """Marks the fewest most probable tokens whose probabilities exceed `top_p` together.

    Args:
        logits: `[batch, vocabulary]` float.
        top_p: in (0, 1]; 1 keeps everything.

    Returns:
        bool, shape of `logits`. The largest token is always kept.
    """
    ordered, order = upcast(logits).softmax(-1).sort(dim=-1, descending=True, stable=True)
    inside = ordered.cumsum(-1) - ordered <= top_p
    return torch.zeros_like(inside).scatter(-1, order, inside)


def answer_votes(
    logits: Tensor, tokens: Tensor, answers: Tensor, *, threshold: float, mask: Tensor
) -> Tensor:
    """Adds up what paths of reasoning say for each answer, weighted by how sure they are (MVP).

    A path whose first token has probability p and whose first answer stands at place t gives
    `p * (p1 - p2)` to that answer, p1 and p2 the largest two probabilities at t (certainty,
    arXiv 2408.17150). A path that begins with an answer gives it p, as in the official code;
    a path with p below the threshold, or without an answer, gives nothing.

    Args:
        logits: with which the tokens were written, `[batch, paths, tokens, vocabulary]` float.
        tokens: int64 `[batch, paths, tokens]`.
        answers: bool `[answers, vocabulary]`, which tokens are which answer.
        threshold: probability of the first token below which a path is not counted, in [0, 1].
        mask: bool `[batch, paths, tokens]`, the tokens before the end of a path.

    Returns:
        fp32 `[batch, answers]`, >= 0.
    """
    first = upcast(logits[:, :, 0]).softmax(-1).gather(-1, tokens[:, :, :1]).squeeze(-1)
    said = answers[:, tokens] & mask
    place = said.any(0).int().argmax(-1, keepdim=True)
    there = logits.gather(2, place[..., None].expand(-1, -1, 1, logits.shape[-1])).squeeze(2)
    largest = upcast(there).softmax(-1).topk(2, dim=-1).values
    is_direct = place.squeeze(-1) == 0
    certainty = torch.where(is_direct, 1.0, largest[..., 0] - largest[..., 1])
    vote = first * certainty * (is_direct | (first >= threshold))
    is_answer = said.gather(-1, place.expand(len(answers), *place.shape)).squeeze(-1)
    return (vote * is_answer).sum(-1).T
