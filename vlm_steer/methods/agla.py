"""AGLA: add the prediction for the image without what the question is not about."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Branch, Method, Reference, Rows, Selector
from vlm_steer.engine.selectors import select
from vlm_steer.matching import Match, Matcher
from vlm_steer.methods._contrast import Contrast
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["AGLA"]

_OWN = "own"
_OWN_KEEP = 0.8  # what a similarity of 0.4 gives


@register_method("agla")
@dataclass(frozen=True, kw_only=True)
class AGLA(Contrast):
    """Assembly of global and local attention: add what the relevant parts of the image say.

    A matching model tells how relevant each part of the image is to the question, and how similar
    image and question are, s. A second stream sees the image with its least relevant parts black;
    with n its logits (arXiv 2406.12718)::

        kept := 1 - s / 2   of the image, the most relevant parts
        l    := l + alpha * n,   kept where l >= log(beta) + max(l)

    Deviations: the authors match with BLIP (the gradient of its match head at the sixth layer of
    its text encoder); here any dual encoder of transformers can be named, whose Grad-CAM at the
    last vision layer is taken, or the steered model matches by its own attention from the question
    to the image (``matcher: own``), which measures no similarity. They squash the image to
    384 x 384 pixels, so that both streams see other proportions; here the parts of the image that
    become whole image tokens are blanked where the model sees them. Their code lets both streams
    share a cache from the second token on, so that the numbers it gives for long answers are those
    of a lower temperature.

    Cost: one extra stream, one more encoding of the image, and the matching: a pass over the
    prompt (``own``), or the matching model forth and one layer of it back.

    Attributes:
        alpha: Strength, >= 0; 0 leaves only the threshold. Sensible 0.5 to 3.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.
        matcher: ``own``, or the folder or hub id of a dual encoder such as
            ``openai/clip-vit-large-patch14-336``, which needs the processor that belongs to the
            steered model.
        keep: Share of the image tokens that stay, above 0, at most 1; null for 1 - s / 2 with a
            dual encoder, and for 0.8 with ``own``. Sensible 0.3 to 0.9.
        blank: What the others become: ``black``, which needs the processor, or ``mean``, the grey
            that the processor takes off.
        layers: Decoder layers whose attention is read with ``own``.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("agla")(keep=0.5).alpha
        2.0

    Raises:
        ConfigError: A number is outside its range, the processor is missing, or the matching model
            cannot be loaded.
        UnsupportedModelError: It is not known which pixels make which image token.
    """

    paper: ClassVar[str] = "arXiv:2406.12718"
    needs_image_tokens: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True
    branch: ClassVar[str] = "relevant"
    form: ClassVar[Literal["subtract", "add"]] = "add"

    alpha: float = 2.0
    beta: float = 0.5
    matcher: str = _OWN
    keep: float | None = None
    blank: Literal["black", "mean"] = "black"
    layers: Selector = (0.25, 0.75)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.matcher), "matcher is empty; write own, or name a matching model")
        self.require(
            self.keep is None or 0 < self.keep <= 1,
            f"keep is {self.keep}; it must be above 0 and at most 1, or null",
        )

    @property
    def needs_processor(self) -> bool:  # type: ignore[override]  # a class variable elsewhere
        """Whether the matching model needs the picture and the question."""
        return self.alpha > 0 and self.matcher != _OWN

    def ignored_options(self) -> dict[str, str]:
        ignored = {"scope": f"{self.name} adds a stream of its own"}
        if self.matcher != _OWN:
            ignored["layers"] = "matcher is not own, so no attention is read"
        if self.alpha == 0:
            why = "alpha is 0, so no image is blanked"
            ignored |= dict.fromkeys(("matcher", "keep", "blank", "layers"), why)
        return ignored

    def overrides(self, hook: str) -> bool:
        return (hook != "prepare" or self.alpha > 0) and super().overrides(hook)

    def select_layers(self, model: "ModelInfo") -> tuple[int, ...]:
        layers = select(self.layers, model.n_layers)
        return tuple(layer for layer in layers if layer in model.attention_layers)

    def resolve(self, model: "ModelInfo") -> Matcher | None:
        if not self.needs_processor:
            return None
        device = model.model.device
        return model.remember(("matcher", self.matcher), lambda: Matcher.load(self.matcher, device))

    def branches(self) -> tuple[Branch, ...]:
        if self.alpha == 0:
            return ()
        blank = () if self.blank == "black" else (0.0,)
        return (Branch(self.branch, shows=_as_prepared, blank=blank),)

    def prepare(self, reference: Reference) -> Tensor:
        """``[batch, prompt]`` bool, the image tokens that stay."""
        is_image = reference.columns.is_image
        if reference.plan is None:
            relevance, share = self._looked_at(reference), torch.tensor(_OWN_KEEP)
        else:
            relevance, share = self._matched(reference)
        if self.keep is not None:
            share = torch.full_like(share, self.keep)
        count = (share.to(is_image.device) * is_image.sum(dim=1)).long().clamp(min=1)
        relevance = relevance.to(is_image.device)
        return F.least_attended_tokens(relevance[:, None], is_image, count=count, largest=True)

    def _looked_at(self, reference: Reference) -> Tensor:
        """``[batch, prompt]``: the attention of the question, mean over layers."""
        tallies = reference.tallies(_Question(layers={"indices": list(reference.layers)}))
        return torch.stack([t.to("cpu", torch.float32) for t in tallies.values()]).mean(dim=0)

    def _matched(self, reference: Reference) -> tuple[Tensor, Tensor]:
        """Relevance ``[batch, prompt]`` and the share to keep, ``[batch]``."""
        grid = reference.grid()
        known: dict[tuple[Any, ...], Match] = {}
        relevance, shares = torch.zeros(grid.image.shape), []
        rows = zip(reference.pictures(), reference.questions(), grid.shapes, strict=True)
        for index, (pictures, question, shapes) in enumerate(rows):
            if not pictures:
                shares.append(1.0)
                continue
            key = (question, *map(id, pictures))  # beams repeat them
            if key not in known:
                known[key] = reference.plan.match(pictures, question, shapes)
            match = known[key]
            of_row = torch.cat([part.flatten().cpu() for part in match.relevance])
            relevance[index, grid.image[index].cpu() >= 0] = of_row
            shares.append(min(max(1 - match.similarity / 2, 0.0), 1.0))
        return relevance, torch.tensor(shares)


def _as_prepared(prepared: Tensor) -> Tensor:
    return prepared


@dataclass(frozen=True, kw_only=True)
class _Question(Method):
    """The attention that the rows behind the image pay to each column, mean over heads."""

    rows: ClassVar[Rows] = "all"
    observer: ClassVar[bool] = True

    def tally(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, key]``."""
        is_question = at.row_kinds == at.columns.INSTRUCTION
        return (weights.mean(dim=1) * is_question[:, :, None]).sum(dim=1)


_Question.name = "agla"
