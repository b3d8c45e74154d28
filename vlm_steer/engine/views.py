"""What hooks are given: small read-only views of a running model, and what they may ask for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from vlm_steer.errors import SteerError

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = [
    "At",
    "Attends",
    "Branch",
    "Columns",
    "Grid",
    "Insertion",
    "LogitsAt",
    "PromptAt",
    "Reference",
    "Rows",
    "Scope",
    "ToLogits",
    "VisionAt",
    "Writing",
    "Written",
    "no_logits",
]

Scope: TypeAlias = Literal["positive", "negative", "all"]
Attends: TypeAlias = Literal["self", "image", "both"]
Rows: TypeAlias = Literal["last", "after_image", "text", "image", "all"]


@dataclass(frozen=True, slots=True)
class Insertion:
    """Text that the prompt of a branch has and the user's has not.

    Attributes:
        text: The text, which needs the model's processor, or its token ids.
        where: ``instruction`` puts it behind the last image, ``start`` in front of the prompt,
            ``system`` in place of the text before the first image, ``question`` in place of that
            behind the last, ``end`` behind the question.
        tail: For ``question`` and ``end``, the prompt tokens behind the question; ``None`` measures
            the chat template of the processor.
        to_vision: Put it into the instruction that the vision side reads (of a Q-Former), where
            the model has one, instead of the prompt: in front, at the end, or, with ``system``,
            in its place.
        markers: Ids of special tokens, between which and their image nothing is put; added when
            the method is attached.
    """

    text: str | tuple[int, ...]
    where: Literal["instruction", "start", "system", "question", "end"] = "instruction"
    tail: int | None = None
    to_vision: bool = False
    markers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """One extra stream that runs beside the user's.

    Attributes:
        name: Key under which ``LogitsAt.branches`` holds its logits.
        drop_image: Remove the image tokens and everything that belongs to them.
        pixels: ``pixels(tensor, sizes)`` maps the pixels of the user's images to the branch's;
            ``None`` keeps them. Dimension 0 of the tensor runs over images, or over the patches
            of all images, of which the i-th image has ``sizes[i]``.
        shows: ``shows(prepared)``, of what ``Method.prepare`` returned, says which image tokens the
            user's images still show, ``[batch, prompt]`` bool; the pixels that make the others are
            blanked. For methods with ``needs_grid``.
        blank: What blanked pixels hold, one number per channel as the model takes it; none for
            black, which is read off the model's processor when the method is attached.
        insert: Text to add to the prompt.
        inserts: ``inserts(prepared)`` is text of each row to put behind that of ``insert``,
            ``[batch, tokens]`` ids, -1 for none.
        after_user: Never run the prompt in one batch with the user's, since it needs what the
            ``choose`` hook found there.
        shares_prompt: The prompt, its last token excepted, is to the branch what it is to the user,
            so that it goes on from a copy of the user's cache where that can be made.
    """

    name: str
    drop_image: bool = False
    pixels: Callable[[Tensor, tuple[int, ...] | None], Tensor] | None = None
    shows: Callable[[Any], Tensor] | None = None
    blank: tuple[float, ...] = ()
    insert: Insertion | None = None
    inserts: Callable[[Any], Tensor] | None = None
    after_user: bool = False
    shares_prompt: bool = False


class Columns:
    """What the key columns of one layer are; boolean masks ``[batch, key]``.

    Image tokens of several images are a union. Left padding, empty slots of a static cache and
    columns that a sliding window has dropped are all ``is_padding`` or absent.

    Attributes:
        kinds: ``[batch, key]`` codes.
        axis: ``self`` when the columns are the decoder's own tokens, ``cross`` when they are image
            features on an axis of their own.
    """

    PADDING, SYSTEM, IMAGE, INSTRUCTION, GENERATED = range(5)

    def __init__(self, kinds: Tensor, axis: Literal["self", "cross"] = "self"):
        self.kinds = kinds
        self.axis = axis
        self._prompt_ends: dict[int, Tensor] = {}

    @cached_property
    def is_padding(self) -> Tensor:
        """Not a token at all."""
        return self.kinds == self.PADDING

    @cached_property
    def is_system(self) -> Tensor:
        """Prompt tokens before the first image token (all prompt tokens when there is no image)."""
        return self.kinds == self.SYSTEM

    @cached_property
    def is_image(self) -> Tensor:
        """Image tokens of every image."""
        return self.kinds == self.IMAGE

    @cached_property
    def is_text(self) -> Tensor:
        """Tokens that are not image tokens, prompt or generated."""
        return ~(self.is_padding | self.is_image)

    @cached_property
    def is_instruction(self) -> Tensor:
        """Prompt tokens after the first image token that are not image tokens."""
        return self.kinds == self.INSTRUCTION

    @cached_property
    def is_generated(self) -> Tensor:
        """Tokens that this generation produced."""
        return self.kinds == self.GENERATED

    def is_prompt_end(self, n: int) -> Tensor:
        """The last ``n`` prompt tokens of every row."""
        if n not in self._prompt_ends:
            is_prompt = ~(self.is_padding | self.is_generated)
            place = is_prompt.flip(1).cumsum(1).flip(1)
            self._prompt_ends[n] = is_prompt & (place <= n)
        return self._prompt_ends[n]


def _no_softmax(scores: Tensor) -> Tensor:
    raise SteerError("At.softmax was called outside the scores hook, which alone has a softmax.")


def _no_rotation(*args: Any) -> Tensor:
    """Stands in where there are no scores to place anew."""
    raise SteerError("tokens are placed anew in the scores hook of methods with needs_rotation.")


class ToLogits(Protocol):
    """The model's own final norm and output head, applied to any hidden states."""

    def __call__(self, hidden: Tensor, *, normed: bool = True, mean: bool = False) -> Tensor:
        """``[..., hidden]`` -> ``[..., vocabulary]`` float32; without the norm if told so.

        With ``mean``, ``[batch, layers, hidden]`` -> ``[batch, 1, vocabulary]``, the mean of the
        layers' logits.
        """


def no_logits(hidden: Tensor, *, normed: bool = True, mean: bool = False) -> Tensor:
    """Stands in for the readout where it was not asked for."""
    raise SteerError("to_logits was called by a method without taps and without needs_readout.")


@dataclass(frozen=True, slots=True)
class Grid:
    """Where each image token of a prompt lies in its image.

    A tile of an image, or a frame of a video, is an image of its own.

    Attributes:
        image: ``[batch, prompt]`` int64, number of the token's image in its row, -1 for text.
        shapes: Per row of the batch and image, height and width in tokens; the tokens of an image
            follow each other line by line.
    """

    image: Tensor
    shapes: tuple[tuple[tuple[int, int], ...], ...]

    def spread(self, table: Callable[[int, int], Tensor]) -> Tensor:
        """``table(height, width)`` of every image, token by token; ``[batch, prompt]``, 0 for text.

        Args:
            table: Integers ``[height, width]`` for an image of that shape.
        """
        known = {shape: table(*shape).flatten() for row in self.shapes for shape in row}
        values = torch.zeros_like(self.image)
        if known:
            cells = torch.cat([known[shape] for row in self.shapes for shape in row])
            values[self.image >= 0] = cells.to(values)
        return values


@dataclass(frozen=True, slots=True)
class PromptAt:
    """What the ``positions`` hook sees.

    Attributes:
        columns: What the tokens of the prompt are, ``[batch, prompt]`` masks.
        grid: Where its image tokens lie; only for methods with ``needs_grid``.
        plan: What ``Method.resolve`` returned for this model.
    """

    columns: Columns
    grid: Grid | None
    plan: Any


@dataclass(frozen=True, slots=True)
class At:
    """Where a hook is being called.

    Attributes:
        layer: Index of the decoder layer.
        n_layers: Depth of the decoder.
        step: 0 for the pass over the prompt, then 1, 2, ...
        columns: The key columns of this layer, ``[batch, key]`` masks.
        is_row: ``[batch, rows]``; which of the rows at hand the method may change. The engine
            restores the others, so methods may ignore it.
        row_kinds: ``[batch, rows]``; the same codes as ``Columns`` for the query rows.
        marks: ``[batch, key]`` columns that the method's own ``marks`` hook marked at this layer,
            or ``None`` when it has no such hook.
        plan: What ``Method.resolve`` returned for this model.
        prepared: What ``Method.prepare`` returned for this generation.
        prompt: What the tokens of the prompt are, ``[batch, prompt]`` masks.
        grid: Where the image tokens of the prompt lie; only for methods with ``needs_grid``.
        on_rows: Values ``[batch, prompt]`` of the prompt's tokens -> those of the rows at hand,
            ``[batch, rows]``, 0 for generated tokens.
        on_keys: The same for the key columns of this layer, ``[batch, key]``; further axes may
            stand between.
        is_own: ``is_own()`` is ``[rows, key]``, ``True`` where the column is the row's own token,
            nowhere in cross-attention.
        once: ``once(name, make)`` returns ``make()`` of the first call in this generation, per
            method, layer and stream.
        chosen: What the method's own ``choose`` hook returned, by the layer it saw, brought to the
            key columns of this layer (to those of the prompt in ``embeds``).
        seen: In the ``heads`` hook, what the method's own ``look`` hook returned for these rows.
        softmax: In the ``scores`` hook, ``softmax(scores)`` are the attention weights that scores
            of the rows at hand become under their mask.
        unplaced: In the ``scores`` hook of methods with ``needs_rotation``, ``unplaced()`` are
            the scores if all tokens stood at one position.
        placed: There too, ``placed(shift)`` are the scores if the rows stood ``shift``
            ``[batch, heads, rows]`` int64 positions further right.
        sum_over_rows: There too, ``sum_over_rows(f)`` adds up ``f(at)`` over the blocks in which
            the engine goes through the rows of this pass, each with a view of its own.
        to_logits: The model's own final norm and output head. For methods that set
            ``needs_readout``.
        prompt_rows: How many of the rows at hand belong to the prompt; they come first. Without a
            cache the prompt and all generated tokens pass together.
        row_before: In the ``tally`` hook, the weights of the row before the block at hand,
            ``[batch, heads, 1, key]``; zeros before the first row of a pass.
        tally: ``[batch, ..., prompt]``, the sum over the prompt's rows of what the method's own
            ``tally`` hook returned at this layer, by position; ``on_keys`` puts it on the columns.
            ``None`` in the ``scores`` hook while the sum is being made.
        carried: What the method's own ``carry`` hook returned at this layer.
        mlp_input: In the ``mlp`` hook, what the MLP was given, ``[batch, rows, hidden]``.
        image_features: ``[batch, image_tokens, hidden]``, the embeddings of the image tokens as
            they enter the decoder, shorter rows filled up with zeros. For methods that set
            ``needs_image_features``; ``None`` where the prompt holds no image.
    """

    layer: int
    n_layers: int
    step: int
    columns: Columns
    is_row: Tensor
    row_kinds: Tensor
    marks: Tensor | None
    plan: Any
    prepared: Any
    prompt: Columns
    grid: Grid | None
    on_rows: Callable[[Tensor], Tensor]
    on_keys: Callable[[Tensor], Tensor]
    is_own: Callable[[], Tensor]
    once: Callable[[str, Callable[[], Tensor]], Tensor]
    chosen: Mapping[int, Tensor] = field(default_factory=dict)
    seen: Tensor | None = None
    softmax: Callable[[Tensor], Tensor] = _no_softmax
    unplaced: Callable[[], Tensor] = _no_rotation
    placed: Callable[[Tensor], Tensor] = _no_rotation
    sum_over_rows: Callable[[Callable[["At"], Tensor]], Tensor] = _no_rotation
    to_logits: ToLogits = no_logits
    prompt_rows: int = 0
    row_before: Tensor | None = None
    tally: Tensor | None = None
    carried: Tensor | None = None
    mlp_input: Tensor | None = None
    image_features: Tensor | None = None


@dataclass(frozen=True, slots=True)
class VisionAt:
    """What the ``vision`` hook sees.

    Attributes:
        layer: Index of the layer of the vision tower.
        site: Whether the states are what the layer's MLP gave or the residual stream after it.
        plan: What ``Method.resolve`` returned for this model.
    """

    layer: int
    site: Literal["mlp", "residual"]
    plan: Any


@dataclass(frozen=True, slots=True)
class LogitsAt:
    """What the ``logits`` and ``plausible`` hooks see.

    Attributes:
        raw: The positive stream's logits before any method, ``[batch, vocabulary]`` float32.
        branches: Logits of this method's branches by name, ``[batch, vocabulary]`` float32.
        step: 0 for the first generated token.
        plan: What ``Method.resolve`` returned for this model.
        prepared: What ``Method.prepare`` returned for this generation.
        tapped: States of the layers of ``Method.select_taps`` at the last row, after every
            ``hidden`` hook, ``[batch, taps, hidden]``; of the positive stream under ``None``, of
            this method's branches by name.
        to_logits: The model's own final norm and output head.
        first_ids: Token ids with which the words of ``Method.first_words`` begin.
    """

    raw: Tensor
    branches: Mapping[str, Tensor]
    step: int
    plan: Any
    prepared: Any
    tapped: Mapping[str | None, Tensor] = field(default_factory=dict)
    to_logits: ToLogits = no_logits
    first_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def early_logits(
        self, *, normed: bool = True, branch: str | None = None, mean: bool = False
    ) -> Tensor:
        """Next-token logits read off the tapped layers, ``[batch, taps, vocabulary]`` float32.

        Computed when called, for all tapped layers in one product.

        Args:
            normed: Apply the model's final norm before its output head.
            branch: Read a branch of this method instead of the positive stream.
            mean: Give their mean over the layers, ``[batch, 1, vocabulary]``, which costs a single
                row of the output head.
        """
        return self.to_logits(self.tapped[branch], normed=normed, mean=mean)


@dataclass(frozen=True, slots=True)
class Writing:
    """How the model is to write a text beforehand.

    Attributes:
        max_new_tokens: Length limit.
        request: Which of ``Method.requests`` goes into the prompt.
        more: Text of each row to put behind that of the request, ``[batch, tokens]`` ids, -1 for
            none.
        starts: Write so many texts per prompt, the i-th of which begins with the i-th likeliest
            token; ``None`` for one text that begins freely.
        temperature: Draw tokens at this temperature, > 0; ``None`` takes the likeliest.
        top_p: Nucleus to draw from, in (0, 1].
        seed: Of the draws, which every prompt of a batch shares.
        until: Ids with which a text ends; they belong to it.
        keeps_logits: Whether ``Written.logits`` is wanted, which takes memory.
    """

    max_new_tokens: int
    request: int = 0
    more: Tensor | None = None
    starts: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    until: tuple[int, ...] = ()
    keeps_logits: bool = True


@dataclass(frozen=True, slots=True)
class Written:
    """Texts that the model wrote beforehand; those of one prompt follow each other.

    Attributes:
        ids: ``[texts, tokens]`` int64.
        is_text: ``[texts, tokens]`` bool, before the end of the text.
        logits: ``[texts, tokens, vocabulary]`` float32 of the model, before anything was drawn;
            empty unless asked for.
    """

    ids: Tensor
    is_text: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """Runs passes before generation for ``Method.prepare``.

    Attributes:
        head_outputs_without_image: ``f(layers)`` runs the prompt once with its image tokens
            removed and every intervention off, and returns ``{layer: [batch, heads, head_dim]}``,
            the per-head outputs before the output projection at the last prompt row.
        image_attention: ``f(layers)`` encodes the images once more and returns, for each of these
            layers of the vision encoder (negative ones count from its last), the attention that
            image tokens receive there: ``[images, heads, tokens]``, from the class token, or on
            average from all patches in encoders without one.
        on_image_tokens: ``f(values)`` puts ``[images, tokens]``, one value per image token, at the
            image tokens of the prompt: ``[batch, prompt]``, zero or ``False`` elsewhere.
        hidden_states: ``f(with_image)`` runs the prompt once, with or without its image tokens and
            every intervention off, and returns ``[batch, layers, hidden]``, the residual stream
            at the last prompt row after each of ``layers``.
        tallies: ``f(method)`` runs the prompt once under the ``tally`` hook of another method and
            every other intervention off, and returns ``{layer: [batch, ..., prompt]}``.
        written: ``f(writing)`` lets the model write, every intervention off, what the user's
            prompt asks for with one of ``Method.requests`` in it.
        pictures: ``f()`` gives, per row of the batch, its images (or tiles) as the model sees
            them, ``[channels, height, width]`` in [0, 1]. For methods with ``needs_grid`` and
            ``needs_processor``.
        questions: ``f()`` gives, per row, the text behind its last image. For methods with
            ``needs_processor``.
        grid: ``f()`` says where the image tokens of the prompt lie. For methods with
            ``needs_grid``.
        columns: What the tokens of the prompt are, ``[batch, prompt]`` masks.
        layers: The layers this method acts on.
        plan: What ``Method.resolve`` returned for this model.
        first_ids: Token ids with which the words of ``Method.first_words`` begin.
    """

    head_outputs_without_image: Callable[[tuple[int, ...]], dict[int, Tensor]]
    image_attention: Callable[[tuple[int, ...]], tuple[Tensor, ...]]
    on_image_tokens: Callable[[Tensor], Tensor]
    hidden_states: Callable[[bool], Tensor]
    tallies: "Callable[[Method], dict[int, Tensor]]"
    written: Callable[[Writing], Written]
    pictures: Callable[[], tuple[tuple[Tensor, ...], ...]]
    questions: Callable[[], tuple[str, ...]]
    grid: Callable[[], Grid]
    columns: Columns
    layers: tuple[int, ...]
    plan: Any
    first_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
