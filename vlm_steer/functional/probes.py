"""What attention says about the token being written (Lookback Lens, SVAR, LapEigvals)."""

from torch import Tensor

from vlm_steer.functional._numeric import masked_mean, safe_divide, upcast


def lookback_ratio(weights: Tensor, context: Tensor, new: Tensor) -> Tensor:
    """Returns how much each head looks back at the context rather than at the new text.

    `a_ctx / (a_ctx + a_new)` with a_ctx and a_new *means* over the columns of each set
    (arXiv 2407.07071, eq. 1), so that uniform attention gives 0.5 whatever the lengths. The paper
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
    on_context = masked_mean(a, context[:, None, :])
    on_new = masked_mean(a, new[:, None, :])
    return safe_divide(on_context, on_context + on_new, otherwise=0.0)
