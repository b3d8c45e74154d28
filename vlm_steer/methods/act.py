"""ACT: take attention from sinks in mid-sequence, in calibrated heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.calibration import read_calibration
from vlm_steer.engine.hooks import At, Method, Rows, Selector
from vlm_steer.errors import ConfigError
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["ACT"]


@register_method("act")
@dataclass(frozen=True, kw_only=True)
class ACT(Method):
    """Attention calibration: sinks in mid-sequence give attention to the other tokens.

    With N the length of the prompt, a token k is a sink of a head when the rows that can see it
    give it, on average, more than threshold / N; the first such token, the start of the text, is
    spared (arXiv 2406.15765, section 3). In every row of the calibrated heads, with S the sinks and
    m_S, m_T the row's attention on them and on the rest (section 4)::

        a_k := beta * a_k                              k in S
        a_k := a_k * (1 + (1 - beta) * m_S / m_T)      otherwise

    The paper chooses heads once per model, keeping those that raise the accuracy when calibrated
    alone: ``vlm-steer calibrate act`` does that and writes the file that ``head_list`` reads.

    Deviations of the official code: its threshold is 0.1 whatever N is (``relative: false``, preset
    ``act_official``); while decoding it looks for sinks in a single row and puts attention on the
    start token that rows do not have. Ours finds the sinks in the prompt and keeps them, so that
    decoding with a cache is the same as without. The paper is about text models; ``where`` and
    ``receivers`` restrict the method to the image or to text.

    Cost: all attention rows of the prompt, twice, of its heads alone where no other method needs
    rows; one row when decoding; no extra pass.

    Attributes:
        beta: Fraction of their attention that sinks keep, 0 to 1; 1 disables. The authors use 0.4.
        threshold: Mean received attention above which a token is a sink, > 0, in units of 1 / N
            if ``relative``, else below 1. The paper uses 5, the official code 0.1 not relative.
        relative: Whether the threshold is in units of 1 / N (paper).
        where: Tokens that count as sinks: ``all`` (paper), ``image`` or ``text``.
        receivers: Tokens that get what sinks lose: ``all`` (paper) or ``image``.
        head_list: ``all``, a file written by ``vlm-steer calibrate act``, or heads by layer.
            ``all`` is not what the paper does, and warns.
        layers: Decoder layers. The authors use 2 to 30 of 32.
        scope: Streams to act on.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("act")(head_list={3: (0, 5)}).head_list
        {3: (0, 5)}

    Raises:
        ConfigError: A number is outside its range; at attach, the file cannot be read or is for
            another model, or heads reach outside the model.
        UnsupportedModelError: At attach, for models whose image is not in the token sequence.
    """

    paper: ClassVar[str] = "arXiv:2406.15765"
    rows: ClassVar[Rows] = "all"
    needs_image_tokens: ClassVar[bool] = True

    beta: float = 0.4
    threshold: float = 5.0
    relative: bool = True
    where: Literal["all", "image", "text"] = "all"
    receivers: Literal["all", "image"] = "all"
    head_list: str | dict[int, tuple[int, ...]] = "all"
    layers: Selector = (0.0625, 0.96875)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.beta <= 1, f"beta is {self.beta}; it must lie in [0, 1]")
        self.require(self.threshold > 0, f"threshold is {self.threshold}; it must be above 0")
        self.require(
            self.relative or self.threshold < 1,
            f"threshold is {self.threshold}; it must be below 1 when relative is false",
        )
        self.require(
            isinstance(self.head_list, str) or any(self.head_list.values()),
            "head_list names no head; write all, a file, or heads by layer",
        )

    def is_neutral(self) -> bool:
        return self.beta == 1

    def select_layers(self, model: "ModelInfo") -> tuple[int, ...]:
        listed = self._listed(model)
        layers = super().select_layers(model)
        chosen = tuple(i for i in layers if listed is None or listed.get(i))
        self.require(bool(chosen), f"none of the heads lies in layers {list(layers)}")
        return chosen

    def resolve(self, model: "ModelInfo") -> dict[int, tuple[int, ...]] | None:
        return self._listed(model)

    def _listed(self, model: "ModelInfo") -> dict[int, tuple[int, ...]] | None:
        """Heads by layer; ``None`` for all."""
        if self.head_list == "all":
            return None
        written: Any = self.head_list
        if isinstance(written, str):
            written = read_calibration(written, self.name, model).get("heads")
            self.require(isinstance(written, Mapping), f"{self.head_list} holds no heads by layer")
        listed = {int(layer): tuple(sorted(set(heads))) for layer, heads in written.items()}
        n_heads = model.text_config.num_attention_heads
        for layer, heads in listed.items():
            self.require(
                0 <= layer < model.n_layers and all(0 <= head < n_heads for head in heads),
                f"heads {list(heads)} of layer {layer} reach outside this model, which has "
                f"{model.n_layers} layers of {n_heads} heads",
            )
        return listed

    def own_heads(self, layer: int, plan: Any) -> tuple[int, ...] | None:
        return None if plan is None else plan[layer]

    def notes(self, plan: Any) -> tuple[str, ...]:
        if plan is None:
            return ()
        return (f"{sum(map(len, plan.values()))} heads in {len(plan)} layers",)

    def warnings(self, plan: Any) -> tuple[str, ...]:
        if plan is not None:
            return ()
        return (
            "head_list is all, while the paper chooses heads for every model; vlm-steer calibrate "
            "act writes a file for head_list",
        )

    def candidates(self, model: "ModelInfo") -> tuple["ACT", ...]:
        heads = range(model.text_config.num_attention_heads)
        return tuple(
            replace(self, head_list={layer: (head,)})
            for layer in super().select_layers(model)
            for head in heads
        )

    def calibrated(self, candidates: Sequence[Method], gains: Sequence[float]) -> dict[str, Any]:
        heads: dict[str, list[int]] = {}
        for candidate, gain in zip(candidates, gains, strict=True):
            ((layer, (head,)),) = candidate.head_list.items()  # type: ignore[attr-defined]
            if gain > 0:
                heads.setdefault(str(layer), []).append(head)
        if not heads:
            raise ConfigError(
                f"{self.name}: none of {len(gains)} heads raises the accuracy when calibrated "
                "alone. Use more or harder samples, or another beta or threshold."
            )
        return {"heads": heads}

    def tally(self, weights: Tensor, at: At) -> Tensor:
        """Attention that columns receive per head, rows that see them, and rows altogether."""
        is_row = at.is_row[:, None, None].to(weights.dtype)
        received = (is_row @ self._of_heads(weights, at)).squeeze(2)
        seen = is_row[:, 0] @ (weights.amax(dim=1) > 0).to(weights.dtype)
        return torch.cat(
            [received, seen, is_row[:, 0].sum(dim=-1, keepdim=True).expand_as(seen)], 1
        )

    def weights(self, weights: Tensor, at: At) -> Tensor:
        if at.tally is None:
            return weights
        tally = at.tally
        # A longer prompt is another turn of the conversation, with sinks of its own.
        sinks = at.once(f"sinks of {tally.shape[-1]}", lambda: self._sinks(tally))
        sinks = at.on_keys(sinks)
        is_image = at.columns.is_image[:, None]
        if self.where != "all":
            sinks = sinks & (is_image if self.where == "image" else ~is_image)
        targets = ~sinks if self.receivers == "all" else ~sinks & is_image
        old = self._of_heads(weights, at)
        new = F.spread_sinks(old, sinks, targets, keep=self.beta)
        return new if new.shape == weights.shape else weights.index_copy(1, self._index(at), new)

    def _sinks(self, tally: Tensor) -> Tensor:
        received, seen, n_rows = tally[:, :-2], tally[:, -2:-1], tally[:, -1:]
        n_rows = n_rows.amax(dim=-1, keepdim=True).clamp(min=1)
        theta = self.threshold / n_rows if self.relative else self.threshold
        return F.attention_sinks(received / seen.clamp(min=1), theta=theta)

    def _of_heads(self, weights: Tensor, at: At) -> Tensor:
        if at.plan is None or weights.shape[1] == len(at.plan[at.layer]):
            return weights  # all heads there are, or all that were computed
        return weights.index_select(1, self._index(at))

    def _index(self, at: At) -> Tensor:
        heads = at.plan[at.layer]
        return at.once("heads", lambda: torch.tensor(heads, device=at.columns.kinds.device))
