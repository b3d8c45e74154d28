"""VDGD: describe the image first, then write what the description supports."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import Branch, Insertion, LogitsAt, Method, Reference, Writing
from vlm_steer.registry import register_method

__all__ = ["VDGD"]


class _Described(NamedTuple):
    """A description of the image.

    Attributes:
        ids: ``[batch, tokens]``, -1 behind its end.
        support: ``[batch, vocabulary]`` how well it supports each token.
    """

    ids: Tensor
    support: Tensor


@register_method("vdgd")
@dataclass(frozen=True, kw_only=True)
class VDGD(Method):
    """Visual description grounded decoding: write only what a description of the image supports.

    The model first describes the image, with the distributions p_j over its description's tokens
    j. Then, with the description put in front of the question, the tokens i of the nucleus
    (``top_p`` at ``temperature``) are scored by (arXiv 2405.15683)::

        score_i = -reduce_j KL(onehot_i || p_j) = -reduce_j(-log p_j(i))

    which is one vector for the whole answer. Greedy decoding takes the best, sampling draws among
    them.

    Deviations of the official code: it always draws, and divides the divergence by the size of
    the vocabulary, which makes the draw all but even (``kl_norm: vocabulary``, preset
    ``vdgd_official``, to be sampled); it encodes the image anew for every token; its long request
    for a description is not reproduced here.

    Cost: a description per generation, of up to ``max_description_tokens`` tokens, whose
    distributions are held in memory; one extra stream with a longer prompt. The stream without
    the description runs too, and its logits go unused.

    Attributes:
        reduce: Over the tokens of the description: ``min``, ``mean`` or ``sum``.
        kl_norm: ``none``, or ``vocabulary`` to divide the divergence by its size.
        top_p: Nucleus, in (0, 1]. Sensible 0.3 to 0.9.
        temperature: Of the nucleus, > 0. Sensible 0.3 to 1.
        max_description_tokens: Length limit of the description, >= 1.
        prompt: What asks for the description, in place of the question. It needs the processor
            that belongs to the model.
        prompt_ids: The same as token ids, for use without a processor.
        introduction: What stands between the image and the description.
        introduction_ids: The same as token ids.
        tail: Prompt tokens behind the question, such as those of "ASSISTANT:"; null measures the
            chat template.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("vdgd")(reduce="mean").top_p
        0.5

    Raises:
        ConfigError: A number is outside its range, or there is neither a processor nor ids.
    """

    paper: ClassVar[str] = "arXiv:2405.15683"

    reduce: Literal["min", "mean", "sum"] = "min"
    kl_norm: Literal["none", "vocabulary"] = "none"
    top_p: float = 0.5
    temperature: float = 0.5
    max_description_tokens: int = 256
    prompt: str = "Describe the image in detail."
    prompt_ids: tuple[int, ...] | None = None
    introduction: str = "The input image is described as follows:"
    introduction_ids: tuple[int, ...] | None = None
    tail: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1"
        )
        self.require(self.temperature > 0, f"temperature is {self.temperature}; it must be above 0")
        self.require(
            self.max_description_tokens >= 1,
            f"max_description_tokens is {self.max_description_tokens}; it must be at least 1",
        )
        self.require(
            self.tail is None or self.tail >= 0, f"tail is {self.tail}; it must be at least 0"
        )
        for name in ("prompt", "introduction"):
            ids = getattr(self, f"{name}_ids")
            self.require(bool(getattr(self, name).strip()), f"{name} is empty; write some text")
            self.require(ids is None or len(ids) > 0, f"{name}_ids is empty; list token ids")

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        for name in ("prompt", "introduction"):
            if getattr(self, f"{name}_ids") is not None:
                ignored[name] = f"{name}_ids are given"
        return ignored

    def requests(self) -> tuple[Insertion, ...]:
        text = self.prompt if self.prompt_ids is None else self.prompt_ids
        return (Insertion(text, where="question", tail=self.tail),)

    def branches(self) -> tuple[Branch, ...]:
        text = self.introduction if self.introduction_ids is None else self.introduction_ids
        return (Branch("described", insert=Insertion(text), inserts=_ids),)

    def prepare(self, reference: Reference) -> _Described:
        written = reference.written(Writing(self.max_description_tokens))
        # A description that ends at once still has the distribution in which it did.
        counted = written.is_text.clone()
        counted[:, 0] = True
        support = F.described_support(
            written.logits.log_softmax(dim=-1), reduce=self.reduce, mask=counted
        )
        return _Described(written.ids.masked_fill(~written.is_text, -1), support)

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        # The support is a description of one token, whichever way it was reduced.
        scores = F.vdgd_logits(
            at.branches["described"],
            at.prepared.support[:, None].to(logits.device),
            top_p=self.top_p,
            temperature=self.temperature,
        )
        return scores / scores.shape[-1] if self.kl_norm == "vocabulary" else scores


def _ids(prepared: _Described) -> Tensor:
    return prepared.ids
