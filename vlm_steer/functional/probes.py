"""What attention says about the token being written (Lookback Lens, SVAR, LapEigvals)."""

import torch
from torch import Tensor

from vlm_steer.functional._numeric import masked_sum, safe_divide, upcast
from vlm_steer.functional.sinks import received_attention


def lookback_ratio(weights: Tensor, context: Tensor, new: Tensor) -> Tensor:
    """Returns how much each head looks back at the context rather than at the new text.

    `a_ctx / (a_ctx + a_new)` with a_ctx and a_new *means* over the columns of each set
    (arXiv 2407.07071), so that uniform attention gives 0.5 whatever the lengths. The paper
    leaves the ratio of the first token, which has no new text, undefined; here an empty set has
    mean 0 and a row without any mass has ratio 0.

    Args:
        weights: post-softmax row that predicts the token, `[batch, heads, key]` float.
        context: bool `[batch, key]`.
        new: bool `[batch, key]`, disjoint from `context`.

    Returns:
        fp32 `[batch, heads]` in [0, 1].
    """
    a = upcast(weights)
    columns = torch.stack([context, new], dim=-1).to(a.dtype)
    means = (a @ columns) / columns.sum(1, keepdim=True).clamp(min=1)
    on_context, on_new = means.unbind(-1)
    return safe_divide(on_context, on_context + on_new, otherwise=0.0)


def column_entropy(weights: Tensor, columns: Tensor) -> Tensor:
    """Returns how evenly each row spreads what it gives to some columns, in nats.

    Entropy of the weights on these columns, made to sum to 1; 0 without any mass on them.

    Args:
        weights: post-softmax rows, `[..., key]` float.
        columns: bool, broadcastable to `weights`.

    Returns:
        fp32 `[...]`, between 0 and the logarithm of the number of columns.
    """
    mass = upcast(weights).masked_fill(~columns, 0)
    total = mass.sum(-1, keepdim=True)
    share = safe_divide(mass, total, otherwise=0.0)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy


def summed_visual_attention_ratio(
    weights: Tensor, visual: Tensor, *, first_layer: int, last_layer: int
) -> Tensor:
    """Returns the attention to the image, summed over the layers that read it (SVAR).

    `sum_{l = first}^{last} mean_h sum_{j in image} A_lhj` for the row that predicts the first
    token of an object (Devils in the Middle Layers, CVPR 2025).

    Args:
        weights: post-softmax row of every layer, `[layers, heads, key]` float.
        visual: bool `[key]`.
        first_layer: first layer of the sum, in `[0, layers)` (authors: 5 of 32).
        last_layer: last layer of the sum, included (authors: 18 of 32).

    Returns:
        fp32 `[1]` in `[0, last_layer - first_layer + 1]`.
    """
    layers = upcast(weights)[first_layer : last_layer + 1]
    return masked_sum(layers, visual).mean(-1).sum(-1, keepdim=True)


def laplacian_eigenvalues(weights: Tensor, *, top_k: int) -> Tensor:
    """Returns the largest eigenvalues of the Laplacian of each attention map (LapEigvals).

    With d_i the mean attention that token i receives from the rows that see it, the Laplacian
    `diag(d) - A` of a causal map is triangular, so its eigenvalues are `d_i - A_ii`
    (arXiv 2502.17598). This does not hold for bidirectional attention.

    Args:
        weights: square causal post-softmax attention, `[layers, heads, sequence, sequence]`.
        top_k: how many, in `[1, sequence]`.

    Returns:
        fp32 `[layers, heads, top_k]`, descending.
    """
    degree = received_attention(weights)
    diagonal = upcast(weights).diagonal(dim1=-2, dim2=-1)
    return (degree - diagonal).topk(top_k, dim=-1).values
