"""MVP: caption the image from several points of view, and let many paths vote on the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import Insertion, LogitsAt, Method, Reference, Writing
from vlm_steer.registry import register_method

__all__ = ["MVP"]


@register_method("mvp")
@dataclass(frozen=True, kw_only=True)
class MVP(Method):
    """Multi-view multi-path reasoning: look from several views, let many paths vote on the answer.

    The model first captions the image as each of several prompts asks (``views``). With a caption
    put in front of the question, the ``k`` likeliest first tokens each begin a path, which is
    drawn until it says one of the ``answers``. With p the probability of a path's first token and
    p1, p2 the largest two probabilities where it says its answer (arXiv 2408.17150)::

        score[answer] = sum over views of weight * sum over paths of p * (p1 - p2)

    and p alone for a path that begins with an answer. Generation then begins with the answer of the
    highest score and goes on as ever: greedily, sampling or with beams. It is a method for
    questions whose answers are listed. A question that no path answers, such as a request for a
    caption, is left to the model.

    Deviations of the official code, which does not run as released: it knows yes and no only,
    counts a path without an answer for yes, looks for the answer among words and then for its
    probability among tokens, takes that probability after temperature, and puts the question in
    lower case. Here an answer is known by the first token of its spellings, which the answers
    must not share. Its prompts for captions are not reproduced here. Captions and paths are
    written with every other intervention off.

    Cost: per view a caption and ``k`` rows of up to ``max_path_tokens`` tokens, before the
    generation; all prompts of a batch and all paths of a view at once.

    Attributes:
        views: What asks for each caption, in place of the question; bottom-up, top-down and
            regular. They need the processor that belongs to the model.
        view_ids: The same as token ids, for use without a processor.
        view_weights: Of the views, >= 0, as many as there are views; all 0 turns the method off.
        k: Paths per view, >= 1. Sensible 3 to 10.
        threshold: Probability of the first token below which a path is not counted, in [0, 1].
            Sensible 0.001 to 0.05.
        answers: Spellings of each answer.
        answer_ids: First tokens of each answer, for use without a processor.
        introduction: What stands between the image and the caption.
        introduction_ids: The same as token ids.
        max_caption_tokens: Length limit of a caption, >= 1.
        max_path_tokens: Length limit of a path, >= 1; 1 counts direct answers only.
        temperature: Of captions and paths, > 0. Sensible 0.2 to 1.
        caption_top_p: Nucleus of captions, in (0, 1].
        path_top_p: Nucleus of paths, in (0, 1].
        seed: Of captions and paths; every row of a batch draws by the same numbers.
        tail: Prompt tokens behind the question, such as those of "ASSISTANT:"; null measures the
            chat template.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("mvp")(k=5).view_weights
        (0.4, 0.4, 0.2)

    Raises:
        ConfigError: A number is outside its range, views and weights do not match, answers begin
            alike, or there is neither a processor nor ids.
    """

    paper: ClassVar[str] = "arXiv:2408.17150"

    views: tuple[str, ...] = (
        "Look closely at shapes, colors and textures, then describe every object in the image.",
        "Start from the overall scene and its setting, then describe the image in detail.",
        "Describe the image in detail.",
    )
    view_ids: tuple[tuple[int, ...], ...] | None = None
    view_weights: tuple[float, ...] = (0.4, 0.4, 0.2)
    k: int = 3
    threshold: float = 0.001
    answers: tuple[tuple[str, ...], ...] = (("Yes", "yes"), ("No", "no"))
    answer_ids: tuple[tuple[int, ...], ...] | None = None
    introduction: str = "This is a caption of the image:"
    introduction_ids: tuple[int, ...] | None = None
    max_caption_tokens: int = 512
    max_path_tokens: int = 50
    temperature: float = 0.7
    caption_top_p: float = 0.95
    path_top_p: float = 1.0
    seed: int = 336
    tail: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "max_caption_tokens", "max_path_tokens"):
            value = getattr(self, name)
            self.require(value >= 1, f"{name} is {value}; it must be at least 1")
        for name in ("caption_top_p", "path_top_p"):
            value = getattr(self, name)
            self.require(0 < value <= 1, f"{name} is {value}; it must be above 0 and at most 1")
        self.require(
            0 <= self.threshold <= 1, f"threshold is {self.threshold}; it must be between 0 and 1"
        )
        self.require(self.temperature > 0, f"temperature is {self.temperature}; it must be above 0")
        self.require(
            self.tail is None or self.tail >= 0, f"tail is {self.tail}; it must be at least 0"
        )
        self.require(
            len(self.view_weights) == len(self._views()) > 0,
            f"there are {len(self._views())} views and {len(self.view_weights)} view_weights; "
            "give one weight for each view, and at least one view",
        )
        self.require(
            all(weight >= 0 for weight in self.view_weights),
            f"view_weights are {list(self.view_weights)}; none may be below 0",
        )
        self._require_texts()

    def _require_texts(self) -> None:
        answers = self._answers()
        self.require(
            len(answers) >= 2 and all(answers),
            f"there are {len(answers)} answers; list at least two, each with a spelling",
        )
        self.require(all(self._views()), "one of the views is empty; say what it asks for")
        self.require(
            bool(self.introduction.strip()) and self.introduction_ids != (),
            "introduction is empty; write some text",
        )

    def _views(self) -> tuple[str, ...] | tuple[tuple[int, ...], ...]:
        return self.views if self.view_ids is None else self.view_ids

    def _answers(self) -> Sequence[tuple[str, ...] | tuple[int, ...]]:
        return self.answers if self.answer_ids is None else self.answer_ids

    def is_neutral(self) -> bool:
        return not any(self.view_weights)

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        for name, ids in (
            ("views", "view_ids"),
            ("answers", "answer_ids"),
            ("introduction", "introduction_ids"),
        ):
            if getattr(self, ids) is not None:
                ignored[name] = f"{ids} are given"
        return ignored

    def first_words(self) -> dict[str, tuple[str, ...] | tuple[int, ...]]:
        return {str(index): spellings for index, spellings in enumerate(self._answers())}

    def requests(self) -> tuple[Insertion, ...]:
        introduction = self.introduction if self.introduction_ids is None else self.introduction_ids
        asking = (Insertion(view, where="question", tail=self.tail) for view in self._views())
        return (*asking, Insertion(introduction))

    def prepare(self, reference: Reference) -> Tensor:
        """``[batch, answers]`` scores."""
        until = tuple(token for ids in reference.first_ids.values() for token in ids)
        total = torch.zeros(())
        for view, weight in enumerate(self.view_weights):
            if weight == 0:
                continue
            caption = reference.written(
                Writing(
                    max_new_tokens=self.max_caption_tokens,
                    request=view,
                    temperature=self.temperature,
                    top_p=self.caption_top_p,
                    seed=self.seed,
                    keeps_logits=False,
                )
            )
            paths = reference.written(
                Writing(
                    max_new_tokens=self.max_path_tokens,
                    request=len(self.view_weights),
                    more=caption.ids.masked_fill(~caption.is_text, -1),
                    starts=self.k,
                    temperature=self.temperature,
                    top_p=self.path_top_p,
                    seed=self.seed,
                    until=until,
                )
            )
            logits, tokens, mask = (
                part.reshape(-1, self.k, *part.shape[1:])
                for part in (paths.logits, paths.ids, paths.is_text)
            )
            answers = _first_tokens(reference.first_ids, logits)
            votes = F.answer_votes(logits, tokens, answers, threshold=self.threshold, mask=mask)
            total = total.to(votes.device) + weight * votes
        return total

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        if at.step > 0:
            return logits
        scores = at.prepared.to(logits.device)
        answers = _first_tokens(at.first_ids, logits)
        is_other = ~answers[scores.argmax(dim=-1)]
        is_decided = scores.amax(dim=-1, keepdim=True) > 0
        return logits.masked_fill(is_other & is_decided, -torch.inf)


def _first_tokens(first_ids: Mapping[str, tuple[int, ...]], like: Tensor) -> Tensor:
    """``[answers, vocabulary]`` bool, the first tokens of each answer."""
    shape = (len(first_ids), like.shape[-1])
    known = torch.zeros(shape, dtype=torch.bool, device=like.device)
    for index, ids in enumerate(first_ids.values()):
        known[index, list(ids)] = True
    return known
