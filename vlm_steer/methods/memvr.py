"""MemVR: remind the MLPs of the image when the model is unsure."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Method, Rows, Selector
from vlm_steer.registry import register_method

__all__ = ["MemVR"]

_WAITING, _FIRES, _FIRED = 0, 1, 2


@register_method("memvr")
@dataclass(frozen=True, kw_only=True)
class MemVR(Method):
    """Memory-space visual retracing: look the image up again in an MLP when the model is unsure.

    With Z the embeddings of the image tokens, p the softmax over the ten largest early logits that
    the input of a layer gives, and x the input of its MLP (arXiv 2410.03577, eqs. 5 to 7)::

        u       = - sum p log10(p)
        FFN'(x) = (1 - alpha) * FFN(x) + alpha * D(x) * mean|FFN(x)| / mean|D(x)|
        D(x)    = phi(x Z^T) Z

    In every step this is done in the first layer with u > threshold, and in no other. The last
    prompt token decides for the whole prompt, every generated token for itself.

    Deviations of the official code: it leaves phi out for LLaMA (``activation: none``, preset
    ``memvr_official``) and takes SiLU for Qwen and GLM, where its scripts never switch the method
    on; its means run over the whole batch and its entropy over the first ten rows of the batch,
    ours over the real tokens of each row; it evaluates the output head in every layer and at every
    token, ours only in the layers given and at the tokens that decide.

    Cost: one output-head product per layer and generated token, on the CPU only until the look-up
    is decided; no extra pass.

    Attributes:
        alpha: Share of the look-up, 0 to 1; 0 disables. The authors use 0.12 for general tasks,
            0.28 to 0.32 for long answers.
        threshold: Uncertainty above which the image is looked up, 0 to 1; 1 disables. The
            authors use 0.75.
        activation: phi, ``silu`` or ``none``.
        layers: Decoder layers whose MLP may be reminded; the input of each is judged. The authors
            use 7 to 16 of 32.
        scope: Streams to act on.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("memvr")(alpha=0.3).alpha
        0.3

    Raises:
        ConfigError: A number is outside its range.
        UnsupportedModelError: At attach, for models whose image is not in the token sequence,
            that have no MLP in these layers or whose output head cannot be found.
    """

    paper: ClassVar[str] = "arXiv:2410.03577"
    rows: ClassVar[Rows] = "all"
    needs_image_tokens: ClassVar[bool] = True
    needs_image_features: ClassVar[bool] = True
    needs_readout: ClassVar[bool] = True

    alpha: float = 0.12
    threshold: float = 0.75
    activation: Literal["silu", "none"] = "silu"
    layers: Selector = (0.21875, 0.53125)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "threshold"):
            value = getattr(self, name)
            self.require(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return self.alpha == 0 or self.threshold == 1

    def carry(self, hidden: Tensor, carried: Tensor | None, at: At) -> Tensor:
        """``[batch, rows]``: whether each row waits, fires in this layer, or has fired."""
        if carried is not None and _is_known(carried != _WAITING):
            return torch.full_like(carried, _FIRED)
        deciding = max(at.prompt_rows - 1, 0)
        unsure = F.retrace_uncertainty(at.to_logits(hidden[:, deciding:])) > self.threshold
        unsure = torch.cat([unsure[:, :1].expand(-1, deciding), unsure], dim=1)
        if carried is None:
            return torch.where(unsure, _FIRES, _WAITING)
        return torch.where(carried == _WAITING, torch.where(unsure, _FIRES, _WAITING), _FIRED)

    def mlp(self, output: Tensor, at: At) -> Tensor:
        if at.image_features is None or at.mlp_input is None or at.carried is None:
            return output
        fires = at.carried == _FIRES
        if _is_known(~fires):
            return output
        n = at.prompt_rows
        spans = ([slice(0, n)] if n else []) + [slice(i, i + 1) for i in range(n, output.shape[1])]
        parts = [self._retraced(output[:, span], at.mlp_input[:, span], span, at) for span in spans]
        sees_image = at.image_features.any(dim=-1).any(dim=-1)
        fires = fires & sees_image[:, None]
        return torch.where(fires[..., None], torch.cat(parts, dim=1), output)

    def _retraced(self, output: Tensor, given: Tensor, span: slice, at: At) -> Tensor:
        return F.memvr_retrace(
            given,
            output,
            at.image_features,  # type: ignore[arg-type]
            ratio=self.alpha,
            mask=at.is_row[:, span],
            activation=self.activation,
        )


def _is_known(holds: Tensor) -> bool:
    """Whether something holds for every row, where looking does not wait for an accelerator."""
    return holds.device.type == "cpu" and bool(holds.all())
