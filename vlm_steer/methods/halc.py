"""HALC: look closer wherever a word names an object, and let contrasts propose another word."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

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
from vlm_steer.engine.selectors import select
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.methods._halc import Search, Tools
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["HALC"]

_OWN = "own"
_LARGEST = 8  # fields: every object costs a pass of each


@register_method("halc")
@dataclass(frozen=True, kw_only=True)
class HALC(Method):
    """Adaptive focal contrast: look closer where a word names an object, and propose another.

    When a word is complete and names an object, it is located in the image, and the text before
    its last token is read again under several fields of view around that place, with logits f_1,
    ..., f_n. The pairs a < b whose predictions differ most give candidates for the token, both ways
    (arXiv 2403.00425)::

        argmax (f_b - weight * f_a),    argmax (f_a - weight * f_b)

    and the candidate that matches the image best takes the token's place. The model's own match
    (``matcher: own``) is its log-probability with the whole image, which keeps the word wherever a
    candidate repeats what greedy decoding chose, and otherwise takes the likeliest candidate.

    Deviations of the official code: it keeps several candidates as beams until their next words
    are complete and then chooses by BLIP; here the choice is made at once, and beams are refused.
    It tags words with spaCy, skips three in ten of them at random and has lists of words that are
    exempt or added; here a word is looked at unless it is one of few words that name nothing, or
    by a tagger or a list of your own. It locates with Grounding DINO or OWLv2, which can be named
    here; by default the place is where the model's own attention lay as it chose the token. It
    cuts fields out of the file; here they are enlarged from the pixels that the model was given,
    of one tile where there are several. Its divergence is swapped (``divergence: kl_m``, preset
    ``halc_official``). It runs one prompt at a time, and every field apart. Fields are read with
    every other intervention off.

    Cost: per object one pass over the prompt and the text so far with ``fields`` rows, and
    another encoding of that many images; where processors cut images into patches or several
    tiles, with as many rows for every prompt of the batch. A token that is replaced costs one more
    pass of all prompts.

    Attributes:
        fields: Fields of view, 2 to 8. Sensible 3 to 5.
        growth: Share of its sides by which a field grows to the next, > 0. Sensible 0.3 to 1.
        n_candidates: Tokens proposed, even, at most ``fields * (fields - 1)``. Sensible 2 to 6.
        weight: Of the other field in a contrast, >= 0. Sensible 0.02 to 0.5.
        divergence: ``jsd``, or ``kl_m``, the swapped one of the official code.
        tagger: ``words``, or the folder or hub id of a part-of-speech tagger, a token
            classification model of transformers.
        words: The words that name objects; null for all but words that never do.
        word_ids: Token ids that name objects, each a whole word, for use without a processor.
        detector: ``attention``, or the folder or hub id of a zero-shot object detector such as
            ``google/owlv2-base-patch16-ensemble``, which needs the processor.
        threshold: Score of a detector's box below which it does not count, in [0, 1]. Sensible
            0.1 to 0.5.
        max_boxes: Words that a detector finds more often than this are left alone, >= 1.
        matcher: ``own``, or the folder or hub id of a dual encoder such as
            ``openai/clip-vit-large-patch14-336``, which needs the processor.
        layers: Decoder layers whose attention tells the place.
        scope: Streams to act on; the text is one, so ``positive`` is the only one with meaning.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("halc")(weight=0.1).fields
        4

    Raises:
        ConfigError: A number is outside its range, a model cannot be loaded, the processor is
            missing, or ``generate`` is asked for beams.
        UnsupportedModelError: The cache of the model cannot be taken back, or it is not known
            which pixels make which image token.
    """

    paper: ClassVar[str] = "arXiv:2403.00425"
    rows: ClassVar[Rows] = "last"
    needs_image_tokens: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    fields: int = 4
    growth: float = 0.6
    n_candidates: int = 4
    weight: float = 0.05
    divergence: Literal["jsd", "kl_m"] = "jsd"
    tagger: str = "words"
    words: tuple[str, ...] | None = None
    word_ids: tuple[int, ...] | None = None
    detector: str = "attention"
    threshold: float = 0.45
    max_boxes: int = 3
    matcher: str = _OWN
    layers: Selector = (0.25, 0.75)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            2 <= self.fields <= _LARGEST, f"fields is {self.fields}; it must be 2 to {_LARGEST}"
        )
        most = self.fields * (self.fields - 1)
        self.require(
            2 <= self.n_candidates <= most and self.n_candidates % 2 == 0,
            f"n_candidates is {self.n_candidates}; it must be even and 2 to {most}, two for "
            "each pair of fields",
        )
        self.require(self.growth > 0, f"growth is {self.growth}; it must be above 0")
        self.require(self.weight >= 0, f"weight is {self.weight}; it must be at least 0")
        self.require(
            0 <= self.threshold <= 1, f"threshold is {self.threshold}; it must be between 0 and 1"
        )
        self.require(self.max_boxes >= 1, f"max_boxes is {self.max_boxes}; it must be at least 1")
        for name in ("tagger", "detector", "matcher"):
            self.require(bool(getattr(self, name)), f"{name} is empty; name one")
        self.require(
            self.word_ids is None or self.detector == "attention",
            "word_ids name no object that a detector could look for; use words with a detector",
        )

    @property
    def needs_processor(self) -> bool:  # type: ignore[override]  # a class variable elsewhere
        """Whether words or pictures are read."""
        return self.word_ids is None or self.matcher != _OWN

    def is_neutral(self) -> bool:
        return () in (self.words, self.word_ids)

    def ignored_options(self) -> dict[str, str]:
        ignored = {"scope": "there is one text to write"}
        if self.detector == "attention":
            why = "detector is attention, which has no boxes to count"
            ignored |= dict.fromkeys(("threshold", "max_boxes"), why)
        else:
            ignored["layers"] = "a detector tells the place, so no attention is read"
        if self.tagger != "words":
            ignored["words"] = "a tagger tells which words name objects"
        if self.word_ids is not None:
            ignored |= dict.fromkeys(("words", "tagger"), "word_ids are given")
        return ignored

    def overrides(self, hook: str) -> bool:
        if hook == "observe":
            return self.detector == "attention"
        return super().overrides(hook)

    def check(self, model: "ModelInfo") -> None:
        if not model.can_take_back:
            raise UnsupportedModelError(
                f"{self.name} takes a token back, but {model.family} has layers whose cache cannot "
                "forget (a window, cross-attention or a recurrent state). Use a method that takes "
                "nothing back, such as agla."
            )
        if getattr(model.model, "get_image_features", None) is None:
            raise UnsupportedModelError(
                f"{self.name} enlarges parts of the image, but {model.family} has no function that "
                "encodes images by themselves, with which to verify where they are. Use a method "
                "that changes the whole image, such as vcd."
            )

    def select_layers(self, model: "ModelInfo") -> tuple[int, ...]:
        layers = select(self.layers, model.n_layers)
        return tuple(layer for layer in layers if layer in model.attention_layers)

    def resolve(self, model: "ModelInfo") -> Tools:
        return Tools.load(self, model)

    def observe(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, prompt]``: attention to image tokens, mean over heads."""
        attention = weights.mean(dim=1) * at.columns.is_image
        return attention[:, : at.prompt.kinds.shape[1]]

    def search_setup(self, asked: Asked) -> SearchSetup:
        self.require(
            asked.num_beams == 1,
            f"num_beams is {asked.num_beams}, but words are chosen by how they match the image. "
            "Generate with num_beams=1, or without halc",
        )
        return SearchSetup(rows=asked.num_return_sequences, streams=True, takes_back=True)

    def search(self, decoding: Decoding) -> Found:
        return Search(self, decoding).run()
