"""What a method sees of a running model, and where it may act.

A method is a frozen dataclass: its fields are its configuration and its overridden hooks are its
behaviour. Hooks get tensors and a small read-only view, and return new tensors. They know nothing
about model families, caches, beams or padding: that is the engine's work.

The hooks, in the order in which data passes them:

==============  =============================================================================
``branches``    which extra streams to run beside the user's (a noised image, no image, ...)
``prepare``     passes before generation, such as one forward without the image
``positions``   position ids of the prompt; generated tokens go on from its last one
``embeds``      what enters the first layer, for the rows of the prompt
``mask``        which query row may attend to which key column; a row of cross-attention that may
                attend to nothing any more gets nothing, zeros
``marks``       a read-only look at a layer's input that marks key columns (sinks)
``carry``       a read-only look at a layer's input that hands a state on from layer to layer
``scores``      attention scores of the steered rows, before the mask and the softmax
``tally``       a read-only look at the attention of every prompt row, summed over them
``weights``     attention weights of the steered rows, after the softmax
``look``        a read-only look at the attention of the steered rows, for ``heads`` to use
``choose``      a read-only look at the predicting row's attention that selects image tokens, for
                later layers, and for the method's own branch
``heads``       per-head outputs before the output projection
``mlp``         output of a layer's MLP
``hidden``      residual stream after a layer
``select_taps`` layers whose residual stream at the last row the ``logits`` hook sees
``logits``      next-token logits, with those of the branches and of the tapped layers
``plausible``   which next tokens stay possible
``observe``     a read-only look at attention weights, returned to the user per generated token
==============  =============================================================================

A hook that is not overridden costs nothing.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from vlm_steer.engine.selectors import Selector, check_selector, select
from vlm_steer.errors import ConfigError, SteerError, without_effect

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = [
    "LAYER_HOOKS",
    "At",
    "Branch",
    "Columns",
    "Grid",
    "Insertion",
    "LogitsAt",
    "Method",
    "PromptAt",
    "Reference",
    "Rows",
    "Scope",
    "Selector",
    "ToLogits",
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
            ``system`` in place of the text before the first image, ``end`` behind the question.
        tail: For ``end``, the prompt tokens behind the question; ``None`` measures the chat
            template of the processor.
        to_vision: Put it into the instruction that the vision side reads (of a Q-Former), where
            the model has one, instead of the prompt: in front, at the end, or, with ``system``,
            in its place.
        markers: Ids of special tokens, between which and their image nothing is put; added when
            the method is attached.
    """

    text: str | tuple[int, ...]
    where: Literal["instruction", "start", "system", "end"] = "instruction"
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
        insert: Text to add to the prompt.
        after_user: Never run the prompt in one batch with the user's, since it needs what the
            ``choose`` hook found there.
    """

    name: str
    drop_image: bool = False
    pixels: Callable[[Tensor, tuple[int, ...] | None], Tensor] | None = None
    insert: Insertion | None = None
    after_user: bool = False


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
        is_prompt = ~(self.is_padding | self.is_generated)
        return is_prompt & (is_prompt.flip(1).cumsum(1).flip(1) <= n)


def _no_softmax(scores: Tensor) -> Tensor:
    raise SteerError("At.softmax was called outside the scores hook, which alone has a softmax.")


def _no_rotation(*args: Any) -> Tensor:
    """Stands in where there are no scores to place anew."""
    raise SteerError("tokens are placed anew in the scores hook of methods with needs_rotation.")


class ToLogits(Protocol):
    """The model's own final norm and output head, applied to any hidden states."""

    def __call__(self, hidden: Tensor, *, normed: bool = True) -> Tensor:
        """``[..., hidden]`` -> ``[..., vocabulary]`` float32; without the norm if told so."""


def no_logits(hidden: Tensor, *, normed: bool = True) -> Tensor:
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
        tally: ``[batch, ..., prompt]``, the sum over all prompt rows of what the method's own
            ``tally`` hook returned at this layer, by position; ``on_keys`` puts it on the columns.
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
    """

    raw: Tensor
    branches: Mapping[str, Tensor]
    step: int
    plan: Any
    prepared: Any
    tapped: Mapping[str | None, Tensor] = field(default_factory=dict)
    to_logits: ToLogits = no_logits

    def early_logits(self, *, normed: bool = True, branch: str | None = None) -> Tensor:
        """Next-token logits read off the tapped layers, ``[batch, taps, vocabulary]`` float32.

        Computed when called, for all tapped layers in one product.

        Args:
            normed: Apply the model's final norm before its output head.
            branch: Read a branch of this method instead of the positive stream.
        """
        return self.to_logits(self.tapped[branch], normed=normed)


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
        columns: What the tokens of the prompt are, ``[batch, prompt]`` masks.
        layers: The layers this method acts on.
        plan: What ``Method.resolve`` returned for this model.
    """

    head_outputs_without_image: Callable[[tuple[int, ...]], dict[int, Tensor]]
    image_attention: Callable[[tuple[int, ...]], tuple[Tensor, ...]]
    on_image_tokens: Callable[[Tensor], Tensor]
    hidden_states: Callable[[bool], Tensor]
    tallies: "Callable[[Method], dict[int, Tensor]]"
    columns: Columns
    layers: tuple[int, ...]
    plan: Any


LAYER_HOOKS = (
    *("embeds", "mask", "marks", "carry", "scores", "tally", "weights", "look", "choose"),
    *("heads", "mlp", "hidden", "observe"),
)


class _Strict(type):
    """Refuses options that a user passes to a method and that the others make meaningless."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        method = super().__call__(*args, **options)
        # dataclasses.replace and copy.replace pass every field, chosen or not.
        if len(options) < sum(field.init for field in dataclasses.fields(method)):
            method.refuse_ignored(options)
        return method


@dataclass(frozen=True, kw_only=True)
class Method(metaclass=_Strict):
    """Base of every intervention and observer.

    Subclasses are frozen, keyword-only dataclasses registered with ``register_method``. They
    override the hooks they need and nothing else.

    Attributes:
        layers: Decoder layers to act on, see ``vlm_steer.engine.selectors``.
        scope: Streams to act on when branches run beside the user's: the user's own
            (``positive``), the branches (``negative``) or ``all``.

    Class attributes:
        rows: Query rows that ``scores``, ``weights`` and ``heads`` may change and ``look`` sees.
            ``last`` are the rows that predict a generated token.
        attends: Attention layers to act in: self-attention, those whose keys hold the image
            (cross-attention where a model has it, else self-attention), or both.
        needs_image_tokens: The method needs image tokens in the decoder's own sequence.
        needs_readout: The method calls ``At.to_logits``; a model whose final norm and output head
            cannot be verified is refused. Tapping layers implies it.
        needs_image_features: The method reads ``At.image_features``.
        needs_grid: The method needs to know where image tokens lie in their image.
        needs_rotation: The method calls ``At.unplaced`` or ``At.placed``; a model whose rotary
            embedding cannot be verified is refused.
        own: Hooks that act on a branch of the method's own and nowhere else, whatever ``scope``
            says: name of the hook to name of the branch.
        chooses_once: The ``choose`` hook sees the prompt's last row only, not those of generated
            tokens.
        observer: The method only reads, so it is never reported as having had no effect.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    rows: ClassVar[Rows] = "last"
    own: ClassVar[Mapping[str, str]] = {}
    chooses_once: ClassVar[bool] = False
    observer: ClassVar[bool] = False
    attends: ClassVar[Attends] = "self"
    needs_image_tokens: ClassVar[bool] = False
    needs_readout: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    needs_image_features: ClassVar[bool] = False
    needs_rotation: ClassVar[bool] = False

    layers: Selector = "all"
    scope: Scope = "positive"

    def __post_init__(self) -> None:
        check_selector(self.layers)

    def ignored_options(self) -> dict[str, str]:
        """Options without effect under the others chosen, each with the reason.

        Writing one of them in a configuration, or passing it to the class, is an error.
        """
        if any(self.overrides(hook) for hook in LAYER_HOOKS):
            return {}
        if self.overrides("positions"):
            return {"layers": f"{self.name} acts on positions, which all layers share"}
        reason = f"{self.name} acts on next-token logits, not in layers"
        if self.overrides("select_taps"):
            return {"scope": reason}
        return {"layers": reason, "scope": reason}

    # -- before generation ------------------------------------------------------------------
    def is_neutral(self) -> bool:
        """Whether these parameters change nothing; such a method is bitwise absent."""
        return False

    def check(self, model: "ModelInfo") -> None:
        """Raise UnsupportedModelError when the method has no meaning for this model."""

    def select_layers(self, model: "ModelInfo") -> tuple[int, ...]:
        """Indices of the decoder layers to act on."""
        return select(self.layers, model.n_layers)

    def layers_of(self, hook: str, layers: frozenset[int], model: "ModelInfo") -> Iterable[int]:
        """Layers in which one attention hook acts, out of or beside those selected."""
        return layers

    def select_taps(self, model: "ModelInfo") -> tuple[int, ...]:
        """Layers whose output at the last row ``LogitsAt.early_logits`` reads; none by default."""
        return ()

    def resolve(self, model: "ModelInfo") -> Any:
        """Constants of this model, computed once when the method is attached."""
        return None

    def notes(self, plan: Any) -> tuple[str, ...]:
        """What was resolved for this model, for ``status()``."""
        return ()

    def warnings(self, plan: Any) -> tuple[str, ...]:
        """What a user of this model should know before running, such as "no sinks found"."""
        return ()

    def branches(self) -> tuple[Branch, ...]:
        """Extra streams to run beside the user's."""
        return ()

    def prepare(self, reference: Reference) -> Any:
        """Run passes before generation; the result is ``At.prepared``."""
        return None

    def positions(self, positions: Tensor, at: PromptAt) -> Tensor:
        """``[batch, prompt]`` int64 position ids, 0 for padding; same shape back.

        Called once per generation and stream. When a later turn goes on from a cache, the tokens
        in it must keep their positions; a method that would move them is refused there.
        """
        return positions

    # -- calibration ------------------------------------------------------------------------
    def candidates(self, model: "ModelInfo") -> "tuple[Method, ...]":
        """Variants of this method to compare with the unsteered model, each by itself."""
        raise ConfigError(f"{self.name} has nothing to calibrate.")

    def calibrated(self, candidates: "Sequence[Method]", gains: Sequence[float]) -> dict[str, Any]:
        """What to write into the file, given how much each candidate raised the accuracy."""
        raise NotImplementedError

    # -- in every forward -------------------------------------------------------------------
    def embeds(self, embeds: Tensor, at: At) -> Tensor:
        """``[batch, prompt, hidden]`` input of the first layer; same shape back."""
        return embeds

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        """``[batch, rows, key]`` bool, ``True`` where the row may attend; same shape back."""
        return allowed

    def marks(self, hidden: Tensor, at: At) -> Tensor:
        """``[batch, rows, hidden]`` layer input of prompt tokens -> ``[batch, rows]`` bool."""
        raise NotImplementedError

    def carry(self, hidden: Tensor, carried: Tensor | None, at: At) -> Tensor:
        """What later hooks of this layer, and this hook at the method's next layer, should know.

        Args:
            hidden: ``[batch, rows, hidden]`` input of the layer, every row of the pass.
            carried: What this hook returned at the method's layer before, in this pass; ``None``
                at the first.
            at: The view.
        """
        raise NotImplementedError

    def scores(self, scores: Tensor, at: At) -> Tensor:
        """``[batch, heads, rows, key]`` float32 scaled scores before the mask; same shape back."""
        return scores

    def weights(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, heads, rows, key]`` float32 weights whose rows sum to 1; same shape back."""
        return weights

    def tally(self, weights: Tensor, at: At) -> Tensor:
        """Something about every key column that is a sum over the prompt's rows.

        Called for the whole prompt, block of rows by block of rows, before the ``weights`` hook of
        the same layer. Padding rows are among the rows; ``at.is_row`` tells.

        Args:
            weights: ``[batch, heads, rows, key]`` float32 weights, before the ``weights`` hooks.
            at: The view.

        Returns:
            ``[batch, ..., key]``; the sum over all blocks is found in ``At.tally``.
        """
        raise NotImplementedError

    def look(self, scores: Tensor, weights: Tensor, at: At) -> Tensor:
        """What ``heads`` of the same layer needs to know about the attention of its rows.

        Args:
            scores: ``[batch, heads, rows, key]`` float32 scores as they enter the softmax; columns
                that a mask closes hold the most negative number or minus infinity.
            weights: ``[batch, heads, rows, key]`` float32 weights, after the hooks of every method.
            at: The view. Long prompts come in blocks of rows.

        Returns:
            ``[batch, rows, ...]``, which ``heads`` finds in ``At.seen``.
        """
        raise NotImplementedError

    def heads(self, outputs: Tensor, at: At) -> Tensor:
        """``[batch, rows, heads, head_dim]`` head outputs before W_O; same shape back."""
        return outputs

    def mlp(self, output: Tensor, at: At) -> Tensor:
        """``[batch, rows, hidden]`` output of the layer's MLP; same shape back."""
        return output

    def hidden(self, hidden: Tensor, at: At) -> Tensor:
        """``[batch, rows, hidden]`` residual stream after the layer; same shape back."""
        return hidden

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        """``[batch, vocabulary]`` float32 next-token logits; same shape back."""
        return logits

    def plausible(self, at: LogitsAt) -> Tensor | None:
        """``[batch, vocabulary]`` bool, which tokens stay possible; ``None`` keeps all."""
        return None

    def choose(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, heads, key]`` weights of the row that predicts -> ``[batch, ..., key]``.

        Later layers of the same stream find it in ``At.chosen``, and so does a branch that runs
        after the user's stream.
        """
        raise NotImplementedError

    def observe(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, heads, key]`` weights of the row that predicts the next token -> a record."""
        raise NotImplementedError

    # -- conveniences -----------------------------------------------------------------------
    def overrides(self, hook: str) -> bool:
        """Whether this method's class overrides the hook of that name."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    def require(self, condition: bool, message: str) -> None:
        """Raise ConfigError with the method's name unless the condition holds."""
        if not condition:
            raise ConfigError(f"{self.name}: {message}")

    def refuse_ignored(self, given: Iterable[str]) -> None:
        """Raise ConfigError when one of the options given has no effect under the others."""
        ignored = self.ignored_options()
        for option in given:
            if option in ignored:
                name = self.name or type(self).__name__
                raise ConfigError(without_effect(name, option, ignored[option]))

    def replace(self, **changes: Any) -> "Method":
        """A copy with other parameters; those kept may lose their effect, those given may not."""
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ConfigError(
                f"{self.name} has no option {', '.join(unknown)}. "
                f"It has {', '.join(sorted(known))}."
            )
        method = dataclasses.replace(self, **changes)
        method.refuse_ignored(changes)
        return method
