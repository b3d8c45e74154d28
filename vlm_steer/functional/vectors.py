"""Turning hidden states towards a direction without changing their length (VTI, VISTA)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vlm_steer.functional._numeric import upcast

_VTI_FACTOR = 0.1  # hidden constant of the official VTI layer


def vti_shift(hidden_states: Tensor, direction: Tensor, *, strength: float) -> Tensor:
    """Rotates hidden states towards a direction found offline (VTI).

    `normalize(normalize(x) + 0.1 * strength * normalize(d)) * ||x||`, official code of
    arXiv 2410.15778, which applies it to the output of the MLP; the paper adds to the residual
    stream and has no factor 0.1. The official code casts the result to fp16.

    Args:
        hidden_states: `[batch, sequence, hidden]` float.
        direction: `[hidden]`, `[batch, 1, hidden]` or `[sequence, hidden]`; any length.
        strength: >= 0; 0 is identity, bitwise (authors: 0.8 to 0.9).

    Returns:
        Hidden states of the same length, shape and dtype.
    """
    if strength == 0:
        return hidden_states
    x = upcast(hidden_states)
    turned = normalize(x, dim=-1) + _VTI_FACTOR * strength * normalize(upcast(direction), dim=-1)
    return _with_length_of(turned, x).to(hidden_states.dtype)


def vsv_shift(hidden_states: Tensor, direction: Tensor, *, strength: float) -> Tensor:
    """Rotates hidden states towards the visual steering vector of the sample (VISTA).

    `normalize(normalize(x) + strength * (1 + max(0, cos(x, -d))) * normalize(d)) * ||x||`,
    official code of arXiv 2502.03628: the more a state points away from the vector, the stronger
    the push. The code applies it to the output of the MLP and casts the result to fp16.

    Args:
        hidden_states: `[batch, sequence, hidden]` float.
        direction: `[hidden]`, or `[batch, 1, hidden]` for one vector per sample; any length.
        strength: >= 0; 0 is identity, bitwise (authors: 0.01 to 0.17).

    Returns:
        Hidden states of the same length, shape and dtype.
    """
    if strength == 0:
        return hidden_states
    x, d = upcast(hidden_states), upcast(direction)
    push = strength * (1 + cosine_similarity(x, -d, dim=-1).clamp(min=0)).unsqueeze(-1)
    turned = normalize(x, dim=-1) + push * normalize(d, dim=-1)
    return _with_length_of(turned, x).to(hidden_states.dtype)


def steering_direction(
    differences: Tensor, *, form: Literal["mean", "mean_plus_component"] = "mean"
) -> Tensor:
    """Summarises differences of hidden states into one direction (VTI, VISTA).

    The official code adds to the mean the first principal component of the *centred* data
    (`mean_plus_component`), a unit vector that carries nothing of the mean; the papers speak of
    the principal direction. With one pair there is no component, and none is added (the official
    VISTA adds the first unit vector there). The component's sign makes the largest of its sample
    scores positive.

    Args:
        differences: wanted minus unwanted, `[pairs, ...]` float, e.g. `[pairs, layers, hidden]`;
            the component is that of the flattened rest.
        form: what to return.

    Returns:
        fp32, shape of one pair.
    """
    values = upcast(differences)
    mean = values.mean(0)
    if form == "mean" or values.shape[0] < 2:
        return mean
    scores, _, components = torch.linalg.svd((values - mean).flatten(1), full_matrices=False)
    first = scores[:, 0]
    sign = first.gather(0, first.abs().argmax(keepdim=True)).sign()
    component: Tensor = sign * components[0]
    return mean + component.reshape(mean.shape)


def _with_length_of(turned: Tensor, x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rescaled: Tensor = normalize(turned, dim=-1) * length
    return rescaled
