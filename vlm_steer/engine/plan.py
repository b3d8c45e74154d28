"""A list of methods resolved for one model: what acts where. Immutable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm_steer.engine.active import AttentionSite
from vlm_steer.engine.hooks import Branch, Insertion, Method, ToLogits, no_logits
from vlm_steer.engine.model import KNOWN_SCORE_OPTIONS, ModelInfo
from vlm_steer.engine.pictures import with_blank
from vlm_steer.engine.prompts import first_ids, with_ids
from vlm_steer.engine.rotary import Rotation
from vlm_steer.errors import CompositionError, ConfigError, UnsupportedModelError

__all__ = ["Bound", "Plan", "Work", "make_plan"]

_ROW_HOOKS = ("scores", "weights", "look", "heads", "mlp", "hidden")
_PROMPT_HOOKS = ("prepare", "positions", "embeds", "mask", "carry", "tally", "choose", "vision")
_ATTENTION_HOOKS = ("mask", "scores", "tally", "weights", "look", "choose", "heads", "observe")
_LAYER_HOOKS = ("hidden", "mlp")
_RECOMPUTED = ("scores", "tally", "weights", "look", "choose", "observe")


@dataclass(frozen=True, eq=False, slots=True)
class Bound:
    """One method of a plan with what was resolved for this model.

    Attributes:
        index: Its place in the plan.
        method: The method.
        layers: Layers where it acts; for attention methods those of a hybrid that have attention.
        constants: What ``Method.resolve`` returned.
        branches: The extra streams it runs.
        first_ids: What ``first_ids`` of its views is.
        requests: What it puts into the prompt for texts written beforehand.
        notes: What the engine has to say of its layers, for ``status()``.
    """

    index: int
    method: Method
    layers: frozenset[int]
    constants: Any
    branches: tuple[Branch, ...]
    first_ids: Mapping[str, tuple[int, ...]]
    requests: tuple[Insertion, ...]
    taps: tuple[int, ...]
    rotation: Rotation | None
    to_logits: ToLogits
    notes: tuple[str, ...]

    def branch_key(self, branch: Branch) -> str:
        """Name of a branch, unique within the plan."""
        return self.key(branch.name)

    @property
    def chooses_anew(self) -> bool:
        """Whether its own branch depends on a choice made at every token."""
        return "choose" in self.method.own and not self.method.chooses_once

    def key(self, name: str) -> str:
        """Name within the plan of the branch that the method calls so."""
        return f"{self.index}:{name}"


@dataclass(frozen=True, eq=False, slots=True)
class Work:
    """What has to be done at one attention site, by hook, in the order of the list of methods."""

    site: AttentionSite
    mask: tuple[Bound, ...]
    scores: tuple[Bound, ...]
    tally: tuple[Bound, ...]
    weights: tuple[Bound, ...]
    look: tuple[Bound, ...]
    choose: tuple[Bound, ...]
    heads: tuple[Bound, ...]
    observe: tuple[Bound, ...]

    @property
    def needs_rows(self) -> bool:
        """Whether rows of the attention matrix have to be computed."""
        hooks = (self.scores, self.tally, self.weights, self.look, self.choose, self.observe)
        return any(hooks)


@dataclass(frozen=True, eq=False)
class Plan:
    """Methods resolved for one model.

    Attributes:
        model: The model.
        bounds: The methods that do something, neutral ones left out.
        methods: All methods as configured.
        work: What to do at each attention site that has anything to do.
        positions, embeds, vision: Methods with that hook.
        marks, carry, hidden, mlp: Methods with that hook, by layer.
        taps: Layers whose output at the last row is kept for the ``logits`` hooks.
        processor: The model's, where the user gave it.
    """

    model: ModelInfo
    methods: tuple[Method, ...]
    bounds: tuple[Bound, ...]
    work: dict[AttentionSite, Work]
    positions: tuple[Bound, ...]
    embeds: tuple[Bound, ...]
    marks: dict[int, tuple[Bound, ...]]
    carry: dict[int, tuple[Bound, ...]]
    hidden: dict[int, tuple[Bound, ...]]
    mlp: dict[int, tuple[Bound, ...]]
    vision: tuple[Bound, ...] = ()
    taps: frozenset[int] = frozenset()
    processor: Any = None

    def with_hook(self, hook: str) -> tuple[Bound, ...]:
        """Methods that override a hook, in order."""
        return tuple(bound for bound in self.bounds if bound.method.overrides(hook))

    @property
    def search(self) -> Bound | None:
        """The method that takes the place of the decoding loop, if any."""
        return next(iter(self.with_hook("search")), None)

    @property
    def acts_on_logits(self) -> bool:
        """Whether any method changes next-token logits."""
        return bool(self.with_hook("logits") or self.with_hook("plausible"))

    @property
    def needs_image_features(self) -> bool:
        """Whether any method reads the embeddings of the image tokens."""
        return any(bound.method.needs_image_features for bound in self.bounds)

    @property
    def has_branches(self) -> bool:
        """Whether any method runs an extra stream."""
        return any(bound.branches for bound in self.bounds)

    @property
    def leaves_prompt(self) -> bool:
        """Whether no method acts on the prompt, or looks at it, before its last row."""
        return not any(
            _overrides(bound.method, (*_PROMPT_HOOKS, "marks"))
            or (bound.method.rows != "last" and _overrides(bound.method, _ROW_HOOKS))
            for bound in self.bounds
        )

    @property
    def prefix(self) -> Literal["untouched", "marked"] | None:
        """How prompts may share a pass over everything up to their last image token.

        ``untouched``: no method acts there, so the unsteered model can run it. ``marked``: methods
        only mark columns there, so it runs under steering. ``None``: a method acts there, runs
        branches or passes of its own, or what the model makes of these tokens, or their positions,
        may depend on the whole prompt.
        """
        if self.model.positions != "rotary" or self.model.has_cross_attention:
            return None
        if self.search is not None or self.model.has_two_way_prompts:
            return None
        for bound in self.bounds:
            method = bound.method
            needs_inputs = method.needs_grid or method.needs_image_features or method.needs_rotation
            if bound.branches or needs_inputs or _overrides(method, _PROMPT_HOOKS):
                return None
            if method.rows not in ("last", "after_image") and _overrides(method, _ROW_HOOKS):
                return None
        if not self.marks:
            return "untouched"
        # The last row of a steered prefix would be taken for one that predicts a token.
        rows = {b.method.rows for b in self.bounds if _overrides(b.method, _ROW_HOOKS)}
        return "marked" if rows <= {"after_image"} else None


def make_plan(methods: Sequence[Method], model: ModelInfo, processor: Any = None) -> Plan:
    """Resolve methods for a model, with its processor where methods bring text of their own.

    Raises:
        UnsupportedModelError: A method has no meaning for this model.
        CompositionError: Two methods cannot act together.
        ConfigError: A selector reaches outside the model, or text needs a processor.
    """
    if model.model.training:
        raise UnsupportedModelError(
            "the model is in training mode, where dropout and gradients would mix with steering. "
            "Call model.eval() first."
        )
    bounds: list[Bound] = []
    seen: dict[str, Method] = {}
    for method in methods:
        if method.name in seen:
            raise CompositionError(
                f"{method.name} is listed twice. List every method once, or give it a union of "
                "layers: {union: [[0, 4], [20, 24]]}."
            )
        seen[method.name] = method
        _check(method, model)
        if method.needs_processor and processor is None:
            raise ConfigError(
                f"{method.name} reads the question and the pictures with the model's processor. "
                "Pass processor=... to steer() or attach()."
            )
        if not method.is_neutral():
            bounds.append(_bind(len(bounds), method, model, processor))
    searches = [bound.method.name for bound in bounds if bound.method.overrides("search")]
    if len(searches) > 1:
        raise CompositionError(
            f"{' and '.join(searches)} each take the place of the decoding loop, of which there is "
            "one. Choose one of them."
        )
    work = {
        site: work
        for site in dict.fromkeys(model.sites.values())
        if (work := _work_at(site, bounds, model)) is not None
    }
    plan = Plan(
        model=model,
        methods=tuple(methods),
        bounds=tuple(bounds),
        work=work,
        positions=tuple(bound for bound in bounds if bound.method.overrides("positions")),
        embeds=tuple(bound for bound in bounds if bound.method.overrides("embeds")),
        marks=_by_layer("marks", bounds),
        carry=_by_layer("carry", bounds),
        hidden=_by_layer("hidden", bounds),
        mlp=_by_layer("mlp", bounds),
        vision=tuple(bound for bound in bounds if bound.method.overrides("vision")),
        taps=_tapped_layers(bounds, model),
        processor=processor,
    )
    return plan


def _check(method: Method, model: ModelInfo) -> None:
    if method.needs_image_tokens and model.has_cross_attention:
        raise UnsupportedModelError(
            f"{method.name} works on image tokens in the decoder's own sequence, but "
            f"{model.family} keeps its image in the keys of cross-attention layers. Use a method "
            "that acts on attention columns or on logits, such as pai or vcd."
        )
    if method.overrides("mlp") and not model.mlps:
        raise UnsupportedModelError(
            f"{method.name} acts on MLPs, but none was found in this model."
        )
    if method.overrides("vision") and not model.vision_layers:
        raise UnsupportedModelError(
            f"{method.name} acts in the layers of the vision tower, but none were found in "
            f"{model.family}. Use a method that acts on the language model."
        )
    if method.needs_grid and (reason := model.geometry.unknown):
        raise UnsupportedModelError(
            f"{method.name} needs to know where image tokens lie in their image, but "
            f"{model.family} does not tell: {reason}. Use a method that needs no image grid."
        )
    if method.overrides("positions") and model.positions != "rotary":
        reason = (
            "its positions have several axes (M-RoPE), on which an image is short already"
            if model.positions == "multi-axis"
            else "it has no rotary positions"
        )
        raise UnsupportedModelError(
            f"{method.name} moves the positions of tokens, but cannot in {model.family}: {reason}. "
            "Turn this part of the method off, or use another one."
        )
    unknown = sorted(model.score_options - KNOWN_SCORE_OPTIONS)
    if unknown and any(method.overrides(hook) for hook in _RECOMPUTED):
        raise UnsupportedModelError(
            f"{method.name} recomputes attention rows, but the attention of {model.family} takes "
            f"{', '.join(unknown)}, whose meaning the engine does not know. Use a method that acts "
            "on heads, hidden states or logits."
        )
    method.check(model)


def _bind(index: int, method: Method, model: ModelInfo, processor: Any) -> Bound:
    try:
        layers = frozenset(method.select_layers(model))
        taps = method.select_taps(model)
    except ConfigError as error:
        raise ConfigError(f"{method.name}: {error}") from None
    attended, notes = _attended(method, layers, model)
    return Bound(
        index=index,
        method=method,
        layers=attended,
        constants=method.resolve(model),
        first_ids=first_ids(method.first_words(), method.name, processor),
        branches=tuple(_resolved(b, method.name, model, processor) for b in method.branches()),
        requests=tuple(_request(each, method.name, model, processor) for each in method.requests()),
        taps=taps,
        rotation=_rotation(method, model) if method.needs_rotation else None,
        to_logits=_readout(method, model) if taps or method.needs_readout else no_logits,
        notes=notes,
    )


def _resolved(branch: Branch, method: str, model: ModelInfo, processor: Any) -> Branch:
    """A branch with its text as token ids and black as numbers."""
    return with_ids(with_blank(branch, method, model, processor), method, model, processor)


def _request(insertion: Insertion, method: str, model: ModelInfo, processor: Any) -> Insertion:
    """A request with its text as token ids."""
    branch = _resolved(Branch("request", insert=insertion), method, model, processor)
    return branch.insert or insertion


def _attended(
    method: Method, layers: frozenset[int], model: ModelInfo
) -> tuple[frozenset[int], tuple[str, ...]]:
    """The layers where a method finds what it acts on, and a note of the others.

    A hybrid has layers without attention, and Mllama has its image in some layers alone.
    """
    acts = any(method.overrides(hook) for hook in _ATTENTION_HOOKS)
    if not acts or any(method.overrides(hook) for hook in _LAYER_HOOKS):
        return layers, ()
    has = {site.layer for site in model.sites.values() if _attends(method, site, model)}
    if not layers & has:
        raise UnsupportedModelError(
            f"{method.name} acts in attention, which none of its layers {sorted(layers)} has in "
            f"this {model.family} model. Choose among layers {sorted(has)}."
        )
    skipped = sorted(layers - has)
    return layers & has, (f"no attention to act on in layers {skipped}",) if skipped else ()


def _rotation(method: Method, model: ModelInfo) -> Rotation:
    try:
        return model.rotation
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{method.name}: {error}") from None


def _readout(method: Method, model: ModelInfo) -> ToLogits:
    try:
        return model.readout
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{method.name} reads logits off early layers: {error}"
        ) from None


def _tapped_layers(bounds: Sequence[Bound], model: ModelInfo) -> frozenset[int]:
    wanted = {layer for bound in bounds for layer in bound.taps}
    # Cross-attention layers may be skipped; then the layer before them stands in.
    return frozenset(model.layers) if wanted and model.has_cross_attention else frozenset(wanted)


def _work_at(site: AttentionSite, bounds: Sequence[Bound], model: ModelInfo) -> Work | None:
    here = [bound for bound in bounds if _attends(bound.method, site, model)]
    hooks = {
        hook: tuple(
            bound
            for bound in here
            if bound.method.overrides(hook)
            and site.layer in bound.method.layers_of(hook, bound.layers, model)
        )
        for hook in _ATTENTION_HOOKS
    }
    return Work(site=site, **hooks) if any(hooks.values()) else None


def _attends(method: Method, site: AttentionSite, model: ModelInfo) -> bool:
    image_axis = "cross" if model.has_cross_attention else "self"
    return (
        method.attends == "both"
        or (method.attends == "self" and site.axis == "self")
        or (method.attends == "image" and site.axis == image_axis)
    )


def _overrides(method: Method, hooks: Sequence[str]) -> bool:
    return any(method.overrides(hook) for hook in hooks)


def _by_layer(hook: str, bounds: Sequence[Bound]) -> dict[int, tuple[Bound, ...]]:
    table: dict[int, tuple[Bound, ...]] = {}
    for bound in bounds:
        if bound.method.overrides(hook):
            for layer in bound.layers:
                table[layer] = (*table.get(layer, ()), bound)
    return table
