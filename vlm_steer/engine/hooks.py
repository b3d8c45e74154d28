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
``tally``       a read-only look at the attention of the prompt's rows, summed over them
``weights``     attention weights of the steered rows, after the softmax
``look``        a read-only look at the attention of the steered rows, for ``heads`` to use
``choose``      a read-only look at the predicting row's attention that selects image tokens, for
                later layers, and for the method's own branch
``heads``       per-head outputs before the output projection
``mlp``         output of a layer's MLP
``hidden``      residual stream after a layer
``vision``      states in the layers of the vision tower
``select_taps`` layers whose residual stream at the last row the ``logits`` hook sees
``logits``      next-token logits, with those of the branches and of the tapped layers
``plausible``   which next tokens stay possible
``observe``     a read-only look at attention weights, returned to the user per generated token,
                or, in methods with ``search``, to that hook
``search``      the loop that turns scores into tokens, in place of that of ``generate``
==============  =============================================================================

A hook that is not overridden costs nothing.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from vlm_steer.engine.search import Asked, Decoding, Found, SearchSetup
from vlm_steer.engine.selectors import Selector, check_selector, select
from vlm_steer.engine.views import (
    At,
    Attends,
    Branch,
    Columns,
    Grid,
    Insertion,
    LogitsAt,
    PromptAt,
    Reference,
    Rows,
    Scope,
    ToLogits,
    VisionAt,
    Writing,
    Written,
    no_logits,
)
from vlm_steer.errors import ConfigError, without_effect

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = [
    "LAYER_HOOKS",
    "Asked",
    "At",
    "Attends",
    "Branch",
    "Columns",
    "Decoding",
    "Found",
    "Grid",
    "Insertion",
    "LogitsAt",
    "Method",
    "PromptAt",
    "Reference",
    "Rows",
    "Scope",
    "SearchSetup",
    "Selector",
    "ToLogits",
    "VisionAt",
    "Writing",
    "Written",
    "no_logits",
]

LAYER_HOOKS = (
    *("embeds", "mask", "marks", "carry", "scores", "tally", "weights", "look", "choose"),
    *("heads", "mlp", "hidden", "observe", "vision"),
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
        needs_processor: The method asks for pictures or questions, for which the model's processor
            has to be given when it is attached.
        needs_rotation: The method calls ``At.unplaced`` or ``At.placed``; a model whose rotary
            embedding cannot be verified is refused.
        own: Hooks that act on a branch of the method's own and nowhere else, whatever ``scope``
            says: name of the hook to name of the branch.
        chooses_once: The ``choose`` hook sees the prompt's last row only, not those of generated
            tokens.
        observer: The method only reads, so it is never reported as having had no effect.
        observes_rows: The ``observe`` hook sees every row of ``rows`` instead of the last one of a
            pass: ``[batch, heads, rows, key]`` in blocks of rows, for records
            ``[batch, rows, ...]``.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    rows: ClassVar[Rows] = "last"
    own: ClassVar[Mapping[str, str]] = {}
    chooses_once: ClassVar[bool] = False
    observer: ClassVar[bool] = False
    observes_rows: ClassVar[bool] = False
    attends: ClassVar[Attends] = "self"
    needs_image_tokens: ClassVar[bool] = False
    needs_readout: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    needs_image_features: ClassVar[bool] = False
    needs_processor: ClassVar[bool] = False
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

    def own_heads(self, layer: int, plan: Any) -> tuple[int, ...] | None:
        """Heads whose attention the method reads and changes in a layer; ``None`` for all.

        Where no other method needs attention rows, its hooks are given these heads alone, in this
        order, and else all heads.
        """
        return None

    def notes(self, plan: Any) -> tuple[str, ...]:
        """What was resolved for this model, for ``status()``."""
        return ()

    def warnings(self, plan: Any) -> tuple[str, ...]:
        """What a user of this model should know before running, such as "no sinks found"."""
        return ()

    def first_words(self) -> Mapping[str, tuple[str, ...] | tuple[int, ...]]:
        """Groups of words, or of token ids, whose first tokens ``first_ids`` of a view lists.

        Words need the model's processor. A token with which words of two groups begin is left out.
        """
        return {}

    def branches(self) -> tuple[Branch, ...]:
        """Extra streams to run beside the user's."""
        return ()

    def requests(self) -> tuple[Insertion, ...]:
        """What ``Reference.written`` can put into the user's prompt; nothing by default."""
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

        Called from the first row of the prompt that ``rows`` allows, block of rows by block of
        rows, before the ``scores`` and ``weights`` hooks of the same layer. Other rows are among
        them, such as padding; ``at.is_row`` tells.

        Args:
            weights: ``[batch, heads, rows, key]`` float32 weights, before the ``weights`` hooks.
            at: The view.

        Returns:
            ``[batch, ..., key]``; the sum over all blocks is found in ``At.tally``. The axes
            between may grow from one turn of a conversation to the next.
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

    def vision(self, states: Tensor, at: VisionAt) -> Tensor:
        """``[..., hidden]`` states of image patches in the vision tower; same shape back.

        Called twice in each of its layers, see ``VisionAt.site``. Images that a branch takes over
        encoded are the user's, and changed as the user's are.
        """
        return states

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
        """``[batch, heads, key]`` weights of the row that predicts the next token -> a record.

        See ``observes_rows`` for several rows.
        """
        raise NotImplementedError

    # -- in place of the loop ---------------------------------------------------------------
    def search_setup(self, asked: Asked) -> SearchSetup:
        """What ``search`` needs of ``generate``; refuses ways of decoding that it cannot follow.

        Raises:
            ConfigError: The search does not go with what was asked for.
        """
        raise NotImplementedError

    def search(self, decoding: Decoding) -> Found:
        """Generate until done, in place of the loop; ``num_return_sequences`` texts per prompt."""
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
