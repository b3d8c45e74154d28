"""OPERA: beam search that penalises texts leaning on a summary token, and takes them back."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vlm_steer.engine.hooks import (
    Asked,
    At,
    Decoding,
    Found,
    Method,
    Rows,
    SearchSetup,
    Selector,
)
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.methods._opera import Search
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["OPERA"]


@register_method("opera")
@dataclass(frozen=True, kw_only=True)
class OPERA(Method):
    """Over-trust penalty and retrospection: beams that lean on one summary token lose, and restart.

    A beam is continued by the ``n_candidates`` likeliest tokens, each of which is run through the
    model. Let A_ij be the last layer's attention of the new text to itself, the largest over the
    heads, with these rows. A column that all later rows attend to gets a high product, and
    (arXiv 2311.17911, eqs. 3 to 5)::

        phi_j = 1e-7 * prod_{i >= j} scale * A_ij,    penalty = max_j phi_j
        p     = softmax over the candidates of (score - weight * penalty)

    where score is the log-probability that ``generate`` gives the token. Where the strongest
    column of every beam has been the same one more than ``threshold`` times, the text is taken
    back to just behind that column, and the tokens that followed it may not follow again.

    Deviations of the official code: for the first 10 tokens it gives a bonus for attention to the
    image instead of the penalty, and never goes back to them (``bonus_length``, preset
    ``opera_official``); its products are fp16; it hides every error as "nothing to take back"; it
    runs one prompt at a time, and every candidate apart from the step that follows it. Here
    candidates are rows, and what they computed is kept for those chosen. Its fast setting, with one
    candidate, weighs nothing, and is refused. Finished texts that go
    past a token taken back are dropped. The token at the length limit is not run and so not
    penalised.

    Cost: ``beams * n_candidates`` rows per prompt, from the prompt on, and one attention row per
    token. Taking back n tokens costs n more passes, for every prompt of the batch.

    Attributes:
        beams: Width of the search when ``generate`` is asked for none, >= 1; ``num_beams`` above
            1 holds instead. Sensible 3 to 5.
        n_candidates: Tokens tried per beam, >= 2. Sensible 3 to 5.
        weight: Strength of the penalty, >= 0; 0 turns it off.
        scale: Factor of the attention, > 0. Sensible 30 to 60.
        threshold: Times that a column has to be the strongest before the text is taken back, >= 1.
            Sensible 15 to 25.
        rollbacks: Times that the text is taken back to one place, >= 0; 0 never takes it back.
        bonus_length: Generated tokens that get the image bonus, >= 0.
        window: Last tokens of the text whose attention counts, >= 2.
        layers: The one decoder layer whose attention is read.
        scope: Streams to act on; the text is one, so ``positive`` is the only one with meaning.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("opera")(n_candidates=3).scale
        50.0

    Raises:
        ConfigError: A number is outside its range, there is more than one layer, or ``generate``
            is asked to sample.
        UnsupportedModelError: The cache of the model cannot be taken back, or its image has no
            columns in this layer.
    """

    paper: ClassVar[str] = "arXiv:2311.17911"
    rows: ClassVar[Rows] = "last"

    beams: int = 5
    n_candidates: int = 5
    weight: float = 1.0
    scale: float = 50.0
    threshold: int = 15
    rollbacks: int = 5
    bonus_length: int = 0
    window: int = 512
    layers: Selector = field(default_factory=lambda: {"last": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"beams": 1, "n_candidates": 2, "weight": 0, "threshold": 1}
        least |= {"rollbacks": 0, "bonus_length": 0, "window": 2}
        for name, value in least.items():
            given = getattr(self, name)
            self.require(given >= value, f"{name} is {given}; it must be at least {value}")
        self.require(self.scale > 0, f"scale is {self.scale}; it must be above 0")

    def is_neutral(self) -> bool:
        return self.weight == 0 and self.rollbacks == 0

    def ignored_options(self) -> dict[str, str]:
        ignored = {"scope": "there is one text to search"}
        if self.rollbacks == 0:
            ignored["threshold"] = "rollbacks is 0, so nothing is taken back"
        return ignored

    def check(self, model: "ModelInfo") -> None:
        layers = self.select_layers(model)
        self.require(len(layers) == 1, f"layers are {list(layers)}; it reads one layer")
        if self.rollbacks > 0 and not model.can_take_back:
            raise UnsupportedModelError(
                f"{self.name} takes tokens back, but {model.family} has layers whose cache cannot "
                "forget (a window, cross-attention or a recurrent state). Set rollbacks to 0 to "
                "keep the penalty alone."
            )
        if self.bonus_length > 0 and model.has_cross_attention:
            raise UnsupportedModelError(
                f"{self.name}: the bonus is for attention to image columns, which {model.family} "
                "has in cross-attention layers alone. Set bonus_length to 0."
            )

    def observe(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, 2 + generated]``: on the image, on the rest of the prompt, on the new text."""
        strongest = weights.amax(dim=1)
        new = at.columns.is_generated
        image = (strongest * at.columns.is_image).sum(dim=-1)
        rest = (strongest * ~(new | at.columns.is_image)).sum(dim=-1)
        order = new.int().argsort(dim=-1, descending=True, stable=True)[:, : at.step]
        text = strongest.gather(1, order) * new.gather(1, order)
        missing = at.step - text.shape[1]  # columns that a window has dropped
        text = torch.nn.functional.pad(text, (missing, 0))
        return torch.cat([image[:, None], rest[:, None], text], dim=1)

    def search_setup(self, asked: Asked) -> SearchSetup:
        self.require(
            not asked.samples,
            "do_sample is on, but beams are searched without it. Generate with do_sample=False, "
            "or without opera",
        )
        beams = self._width(asked)
        self.require(
            asked.num_return_sequences <= beams,
            f"num_return_sequences is {asked.num_return_sequences}, but there are {beams} beams. "
            "Ask for fewer texts, or set num_beams",
        )
        return SearchSetup(rows=beams * self.n_candidates, takes_back=self.rollbacks > 0)

    def _width(self, asked: Asked) -> int:
        return asked.num_beams if asked.num_beams > 1 else self.beams

    def search(self, decoding: Decoding) -> Found:
        return Search(self, decoding, self._width(decoding.asked)).run()
