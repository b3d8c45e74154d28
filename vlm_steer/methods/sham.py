"""Sham: as much change as another method makes, in the wrong places."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Attends, Method, Reference, Rows
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["Sham"]

_OTHER_HOOKS = (
    "requests",
    "first_words",
    "positions",
    "embeds",
    "choose",
    "select_taps",
    "logits",
    "plausible",
    "search",
    "observe",
    "vision",
)
_SEATS = 1 << 16
_SEED_STRIDE = 1_000_003
_SHARE = 0.5  # of the columns, to which mass is moved
_TINY = 1e-30


@register_method("sham")
@dataclass(frozen=True, kw_only=True)
class Sham(Method):
    """Control: the size of another method's change without its aim.

    A method helps for its reason only if it beats its own sham. The sham runs the method, measures
    what it changed in each attention row, head or state, and makes as large a change elsewhere::

        scores    the changes of the columns, dealt out to random columns
        weights   the mass that was moved, moved to random columns instead
        mask      as many columns closed, random ones
        heads     the gains of the heads, dealt out to random heads
        mlp, hidden   a change of the same norm in a random direction

    Columns, heads and directions are drawn once per layer from ``seed``, so that a sham is as
    steady over rows, steps and batches as the method that it imitates.

    Deviations: none, this control is ours.

    Cost: that of the method, and the same again for the change.

    Attributes:
        of: The method to imitate: a name, or a mapping with ``method`` and its options. It says
            in which layers and streams the sham acts.
        seed: Seed of the places.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("sham")(of="var").imitated.keep
        0.4

    Raises:
        ConfigError: The method is unknown, is a sham, only reads, or acts on logits or by
            branches, for which the controls are a yes-bias and a plausibility mask alone.
    """

    of: str | Mapping[str, Any] = "vhr"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        others = [hook for hook in _OTHER_HOOKS if self.imitated.overrides(hook)]
        others += ["branches"] if self.imitated.branches() else []
        self.require(
            not isinstance(self.imitated, Sham) and not others,
            f"cannot imitate {self.imitated.name}{_because(others)}; it imitates methods that act "
            "on attention, heads or states alone, such as var, or pai with gamma: 1",
        )
        object.__setattr__(self, "scope", self.imitated.scope)

    @cached_property
    def imitated(self) -> Method:
        """The method whose changes are imitated."""
        from vlm_steer.config import resolve

        methods = resolve(self.of)
        self.require(len(methods) == 1, f"of names {len(methods)} methods; it takes one")
        return methods[0]

    @property
    def rows(self) -> Rows:  # type: ignore[override]  # a class variable in every other method
        """Rows of the imitated method."""
        return self.imitated.rows

    @property
    def attends(self) -> Attends:  # type: ignore[override]
        """Attention layers of the imitated method."""
        return self.imitated.attends

    @property
    def needs_image_tokens(self) -> bool:  # type: ignore[override]
        """Whether the imitated method needs image tokens."""
        return self.imitated.needs_image_tokens

    @property
    def needs_image_features(self) -> bool:  # type: ignore[override]
        """Whether the imitated method reads the embeddings of the image tokens."""
        return self.imitated.needs_image_features

    @property
    def needs_readout(self) -> bool:  # type: ignore[override]
        """Whether the imitated method reads logits off hidden states."""
        return self.imitated.needs_readout

    @property
    def needs_grid(self) -> bool:  # type: ignore[override]
        """Whether the imitated method needs the places of image tokens."""
        return self.imitated.needs_grid

    @property
    def needs_rotation(self) -> bool:  # type: ignore[override]
        """Whether the imitated method moves tokens to other positions."""
        return self.imitated.needs_rotation

    def ignored_options(self) -> dict[str, str]:
        reason = "the imitated method says where it acts; write it under of"
        return {"layers": reason, "scope": reason}

    def overrides(self, hook: str) -> bool:
        return self.imitated.overrides(hook)

    def is_neutral(self) -> bool:
        return self.imitated.is_neutral()

    def check(self, model: "ModelInfo") -> None:
        self.imitated.check(model)

    def select_layers(self, model: "ModelInfo") -> tuple[int, ...]:
        return self.imitated.select_layers(model)

    def layers_of(self, hook: str, layers: frozenset[int], model: "ModelInfo") -> Iterable[int]:
        return self.imitated.layers_of(hook, layers, model)

    def resolve(self, model: "ModelInfo") -> Any:
        return self.imitated.resolve(model)

    def warnings(self, plan: Any) -> tuple[str, ...]:
        return self.imitated.warnings(plan)

    def prepare(self, reference: Reference) -> Any:
        return self.imitated.prepare(reference)

    def marks(self, hidden: Tensor, at: At) -> Tensor:
        return self.imitated.marks(hidden, at)

    def carry(self, hidden: Tensor, carried: Tensor | None, at: At) -> Tensor:
        return self.imitated.carry(hidden, carried, at)

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        new = self.imitated.mask(allowed, at)
        opened, closed = (self._elsewhere(flips, at) for flips in (new & ~allowed, allowed & ~new))
        return (allowed | opened) & ~closed

    def scores(self, scores: Tensor, at: At) -> Tensor:
        change = self.imitated.scores(scores, at) - scores
        return scores + self._elsewhere(change, at)

    def tally(self, weights: Tensor, at: At) -> Tensor:
        return self.imitated.tally(weights, at)

    def weights(self, weights: Tensor, at: At) -> Tensor:
        moved = (self.imitated.weights(weights, at) - weights).abs().sum(dim=-1, keepdim=True) / 2
        chosen = (self._seats(at) < _SHARE) & ~at.columns.is_padding
        return F.move_to_columns(weights, chosen, moved)

    def look(self, scores: Tensor, weights: Tensor, at: At) -> Tensor:
        return self.imitated.look(scores, weights, at)

    def heads(self, outputs: Tensor, at: At) -> Tensor:
        new, old = self.imitated.heads(outputs, at).float(), outputs.float()
        gain = (new * old).sum(dim=-1) / old.square().sum(dim=-1).clamp(min=_TINY)
        order = self._numbers(at, gain.device)[: gain.shape[-1]].argsort()
        dealt: Tensor = old * gain[..., order, None]
        return dealt.type_as(outputs)

    def mlp(self, output: Tensor, at: At) -> Tensor:
        return self._other_direction(output, self.imitated.mlp(output, at), at)

    def hidden(self, hidden: Tensor, at: At) -> Tensor:
        return self._other_direction(hidden, self.imitated.hidden(hidden, at), at)

    def _other_direction(self, old: Tensor, new: Tensor, at: At) -> Tensor:
        size: Tensor = (new - old).float().norm(dim=-1, keepdim=True)
        direction = self._numbers(at, old.device)[: old.shape[-1]] - 0.5
        step: Tensor = size * direction / direction.norm()
        return old + step.to(old.dtype)

    def _elsewhere(self, change: Tensor, at: At) -> Tensor:
        """Deal the changes of prompt columns out to random prompt columns of the same row."""
        is_prompt = ~(at.columns.is_padding | at.columns.is_generated)
        return F.shuffle_columns(change, is_prompt, self._seats(at))

    def _seats(self, at: At) -> Tensor:
        """``[batch, key]`` random numbers that follow a token wherever padding moves it."""
        place = (~at.columns.is_padding).long().cumsum(dim=1).sub(1).clamp(min=0)
        return self._numbers(at, place.device)[place.remainder(_SEATS)]

    def _numbers(self, at: At, device: torch.device) -> Tensor:
        """``[65536]`` random numbers in [0, 1) of this layer."""

        def draw() -> Tensor:
            generator = torch.Generator().manual_seed(self.seed * _SEED_STRIDE + at.layer)
            return torch.rand(_SEATS, generator=generator).to(device)

        return at.once("sham_numbers", draw)


def _because(hooks: list[str]) -> str:
    return f", which acts by its {' and '.join(hooks)}" if hooks else ""
