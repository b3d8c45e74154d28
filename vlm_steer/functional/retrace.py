"""Reminding the feed-forward layers of the image (MemVR)."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from vlm_steer.functional._numeric import safe_divide, upcast

_BLOCK = 64


def memvr_retrace(
    mlp_input: Tensor,
    mlp_output: Tensor,
    visual_embeds: Tensor,
    *,
    ratio: float,
    mask: Tensor | None = None,
    activation: Literal["none", "silu"] = "none",
) -> Tensor:
    """Mixes a look-up of the image into the output of an MLP (MemVR).

    With Z the projected image embeddings and `D = act(x Z^T) Z` (arXiv 2410.03577)::

        (1 - ratio) * FFN(x) + ratio * D * mean|FFN(x)| / mean|D|

    The paper has an activation; the official code has none for LLaMA and SiLU for Qwen and GLM.
    The official means run over the whole batch; ours run over each row, and over its real tokens
    where `mask` is given, so that neither neighbours nor padding matter.

    Args:
        mlp_input: x, `[batch, sequence, hidden]` float.
        mlp_output: FFN(x), same shape.
        visual_embeds: Z, `[image_tokens, hidden]` or `[batch, image_tokens, hidden]`; rows of
            zeros count nothing, so that ragged images can be padded.
        ratio: share of the look-up, in [0, 1]; 0 is identity, bitwise (authors: 0.12 to 0.32).
        mask: bool `[batch, sequence]`, tokens that the means run over; None for all.
        activation: applied to the similarities.

    Returns:
        New MLP output, shape and dtype of `mlp_output`.
    """
    x, out, memory = upcast(mlp_input), upcast(mlp_output), upcast(visual_embeds)
    # Block by block: a prompt's similarities to all of its image would be as large as its square.
    blocks = [
        _activated(rows @ memory.transpose(-1, -2), activation) @ memory
        for rows in torch.split(x, _BLOCK, dim=1)
    ]
    retraced = torch.cat(blocks, dim=1)
    size = safe_divide(_magnitude(out, mask), _magnitude(retraced, mask), otherwise=0.0)
    return ((1 - ratio) * out + ratio * (retraced * size)).to(mlp_output.dtype)


def retrace_uncertainty(logits: Tensor, *, top_k: int = 10) -> Tensor:
    """Returns how undecided the model is among its best tokens (MemVR's trigger).

    Entropy of the softmax over the `top_k` largest logits, in units of `log(top_k)`
    (arXiv 2410.03577, top 10). The official code slices the batch axis instead for batches
    larger than one.

    Args:
        logits: `[batch, vocabulary]` float.
        top_k: >= 2.

    Returns:
        fp32 `[batch]` in [0, 1].
    """
    best = upcast(logits).topk(top_k, dim=-1).values.softmax(-1)
    entropy: Tensor = torch.special.entr(best).sum(-1)
    return entropy / math.log(top_k)


def _activated(similarity: Tensor, activation: Literal["none", "silu"]) -> Tensor:
    return silu(similarity) if activation == "silu" else similarity


def _magnitude(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sums the absolute values of each row; ratios of sums are ratios of means."""
    sizes = values.abs().sum(-1)
    if mask is not None:
        sizes = sizes.masked_fill(~mask, 0)
    return sizes.sum(-1)[:, None, None]
