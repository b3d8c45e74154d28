"""What the engine knows about a model, discovered from the model itself.

Nothing here is a table of model families: the decoder, its attention modules, the layers around
them and the image token ids are read off the loaded model.
"""

import inspect
import re
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from vlm_steer.engine.active import ACTIVE, AttentionSite, Probe
from vlm_steer.engine.grid import Geometry, geometry_of
from vlm_steer.engine.inputs import is_place_mask
from vlm_steer.engine.readout import Readout, find_readout
from vlm_steer.engine.rotary import Rotation, find_rotation
from vlm_steer.engine.vision import why_no_image_attention
from vlm_steer.errors import UnsupportedModelError

_REMEMBERED: "weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Any]]" = (
    weakref.WeakKeyDictionary()
)
T = TypeVar("T")

__all__ = [
    "KNOWN_SCORE_OPTIONS",
    "AttentionSite",
    "ModelInfo",
    "eager_function",
    "inspect_model",
    "kept_module_state",
    "one_stream",
    "unwrap",
]

_IMAGE_TOKEN_NAMES = (
    "image_token_id",
    "image_token_index",
    "media_token_id",
    "media_placeholder_token_id",
    "video_token_id",
    "video_token_index",
)
# Where none of these is there, a name such as `img_context_token_id` or `vision_patch_id` will do.
_LIKE_AN_IMAGE_TOKEN = re.compile(
    r"(im|img|image|media|picture|vision|visual)_?\w*(token|patch|pad|placeholder|context)\w*_"
    r"(id|index)"
)
_BESIDE_THE_IMAGE = re.compile("start|begin|end|bo[iv]|eo[iv]|newline|break|row|col|sep|global")
_MLP = re.compile(r"(\w+_)?(mlp|ffn|feed_?forward|moe)|fc2")
_CROSS = re.compile("cross|encoder_attn")
KNOWN_SCORE_OPTIONS = frozenset({"softcap", "s_aux", "sinks", "position_bias"})
# Arguments of an attention function that enter the scores in a way the engine repeats.
_PLAIN_OPTIONS = frozenset(
    {
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "scaling",
        "dropout",
        "training",
        "is_causal",
        "sliding_window",
        "output_attentions",
        "kwargs",
    }
)
# Arguments of an attention function that do not enter the scores, or enter them through the mask.


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """A model as the engine sees it.

    Attributes:
        model: The transformers model itself, adapters unwrapped.
        decoder: Its text decoder.
        owner: The module whose forward a generation loop calls and whose output holds the
            logits: the model itself, or the language model inside it where that one generates.
        sites: Attention modules of the decoder.
        layers: Decoder layers by index.
        mlps: The MLP of each decoder layer that has one.
        configs: Configuration objects that name the decoder's attention implementation.
        n_layers: Depth of the decoder, layers without softmax attention included.
        image_token_ids: Token ids that stand for image (or video frame) features; empty for models
            that are told the places of images by a mask.
        score_options: What the model's attention function takes beside queries, keys, values and
            mask, such as a soft cap.
    """

    model: PreTrainedModel
    decoder: nn.Module
    owner: nn.Module
    sites: dict[nn.Module, AttentionSite]
    layers: dict[int, nn.Module]
    mlps: dict[int, nn.Module]
    configs: tuple[Any, ...]
    n_layers: int
    image_token_ids: tuple[int, ...]
    score_options: frozenset[str] = frozenset()

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with softmax attention; a hybrid has others too."""
        return tuple(sorted({site.layer for site in self.sites.values()}))

    @property
    def family(self) -> str:
        """The ``model_type`` of the configuration."""
        return str(self.model.config.model_type)

    @property
    def has_cross_attention(self) -> bool:
        """Whether image features are keys of cross-attention layers rather than tokens."""
        return any(site.axis == "cross" for site in self.sites.values())

    @property
    def has_image_instruction(self) -> bool:
        """Whether the vision side reads an instruction of its own (a Q-Former's)."""
        return "qformer_input_ids" in inspect.signature(self.model.forward).parameters

    @property
    def begin_token_ids(self) -> tuple[int, ...]:
        """Ids with which a prompt begins."""
        return tuple(sorted(_ids_named(self.model, re.compile("bos_token_id"))))

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids that the configuration names, such as the markers around an image."""
        return tuple(sorted(_ids_named(self.model, re.compile(r"\w+_(token_id|token_index)"))))

    @property
    def text_config(self) -> Any:
        """Configuration of the text decoder."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def why_no_image_attention(self) -> str | None:
        """Why ``Reference.image_attention`` cannot work here, or ``None`` when it should."""
        return self.geometry.unknown or why_no_image_attention(self.model)

    @property
    def base_implementation(self) -> str:
        """Name of the attention implementation in use."""
        return str(self.configs[0]._attn_implementation)

    @cached_property
    def vision_layers(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """Layers of the vision tower, each with its MLP; none where there is no such tower."""
        of_text = {id(module) for module in self.decoder.modules()}
        towers = [
            [(layer, _mlp(layer)) for layer in layers]
            for layers in self.model.modules()
            if isinstance(layers, nn.ModuleList) and not {id(layer) for layer in layers} & of_text
        ]
        found = [[(layer, mlp) for layer, mlp in tower if mlp is not None] for tower in towers]
        found.sort(key=len, reverse=True)
        return tuple(found[0]) if found else ()

    @cached_property
    def geometry(self) -> Geometry:
        """How its image tokens lie in their image."""
        return geometry_of(self.model)

    @cached_property
    def positions(self) -> Literal["rotary", "multi-axis", "other"]:
        """How the decoder knows the order of its tokens."""
        if any(hasattr(module, "get_rope_index") for module in self.model.modules()):
            return "multi-axis"
        names = [name for name, _ in self.decoder.named_buffers()]
        accepts = "position_ids" in inspect.signature(self.decoder.forward).parameters
        return "rotary" if accepts and any(n.endswith("inv_freq") for n in names) else "other"

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """``make()``, computed once per model and kept for as long as the model lives."""
        known = _REMEMBERED.setdefault(self.model, {})
        if key not in known:
            known[key] = make()
        value: T = known[key]
        return value

    def text_only_hidden_states(self, n_tokens: int) -> tuple[Tensor, ...]:
        """Hidden states of a prompt without an image, every intervention off.

        Args:
            n_tokens: Length of the prompt: the start token, where the model has one, then fillers
                spread over the vocabulary.

        Returns:
            One ``[1, n_tokens, hidden]`` per layer, the embeddings first.

        Raises:
            UnsupportedModelError: What the model returns is not its residual stream.
        """
        ids = self.text_only_prompt(n_tokens)
        token = ACTIVE.set(Probe())
        try:
            with torch.no_grad():
                output = self.decoder(input_ids=ids, output_hidden_states=True, use_cache=False)
        finally:
            ACTIVE.reset(token)
        states = tuple(one_stream(state) for state in output.hidden_states)
        widths = sorted({state.shape[-1] for state in states})
        if len(widths) > 1:
            raise UnsupportedModelError(
                f"{self.family} returns hidden states of widths {widths}, not its residual stream, "
                "so sinks cannot be looked for. Name the dimensions: var with sink_dims."
            )
        return states

    def text_only_prompt(self, n_tokens: int) -> Tensor:
        """``[1, n_tokens]`` ids: the start token, where there is one, then fillers."""
        config = self.text_config
        start = getattr(config, "bos_token_id", None)
        start = start if isinstance(start, int) else 0
        vocabulary = [i for i in range(1, config.vocab_size) if i not in self.image_token_ids]
        fillers = vocabulary[:: max(len(vocabulary) // n_tokens, 1)][: n_tokens - 1]
        device = next(self.model.get_input_embeddings().parameters()).device
        return torch.tensor([[start, *fillers]], device=device)

    @property
    def has_windows(self) -> bool:
        """Whether some layers see only a window or a chunk of the sequence."""
        config = self.text_config
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return getattr(config, "sliding_window", None) is not None
        return any("sliding" in kind or "chunked" in kind for kind in kinds)

    @property
    def can_take_back(self) -> bool:
        """Whether the cache of every layer can forget its last tokens, again and again."""
        return self.is_all_attention and not (self.has_windows or self.has_cross_attention)

    @property
    def is_all_attention(self) -> bool:
        """Whether every decoder layer attends, none being recurrent, linear or a convolution."""
        depth = getattr(self.text_config, "num_hidden_layers", None)
        return depth is None or depth == len({site.layer for site in self.sites.values()})

    @property
    def has_two_way_prompts(self) -> bool:
        """Whether tokens of a prompt, or of an image in it, see each other in both directions."""
        return "token_type_ids" in inspect.signature(self.model.forward).parameters

    @property
    def has_image_runs(self) -> bool:
        """Whether the tokens of an image follow each other without other tokens between them."""
        is_tiled = "pixel_attention_mask" in inspect.signature(self.model.forward).parameters
        return self.geometry.is_run and not is_tiled and not self.has_cross_attention

    @property
    def rotation(self) -> Rotation:
        """How queries and keys carry their position, found and verified on first use.

        Raises:
            UnsupportedModelError: Not by one rotary embedding that all layers share.
        """
        return self.remember("rotation", lambda: find_rotation(self))

    @property
    def readout(self) -> Readout:
        """How hidden states become logits in this model, found and verified on first use.

        Raises:
            UnsupportedModelError: It is not a norm and an output head that the engine can find.
        """
        return self.remember("readout", self._find_readout)

    def _find_readout(self) -> Readout:
        token = ACTIVE.set(Probe())
        try:
            with torch.no_grad(), kept_module_state(self.model):
                return find_readout(self.owner, self.decoder, self.layers, self.text_only_prompt(8))
        finally:
            ACTIVE.reset(token)


@contextmanager
def kept_module_state(model: nn.Module) -> Iterator[None]:
    """Restore the M-RoPE offset that Qwen-VL models keep on the module."""
    holders = [module for module in model.modules() if "rope_deltas" in vars(module)]
    saved = [holder.rope_deltas for holder in holders]
    try:
        yield
    finally:
        for holder, value in zip(holders, saved, strict=True):
            holder.rope_deltas = value


def one_stream(hidden: Tensor) -> Tensor:
    """``[batch, rows, hidden]`` of a residual that may have streams, ``[batch, rows, n, hidden]``.

    The mean over the streams is what the model reads its logits from.
    """
    return hidden.mean(dim=2) if hidden.ndim == 4 else hidden


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside an adapter wrapper such as PEFT's, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    if callable(get_base_model) and not isinstance(model, PreTrainedModel):
        model = get_base_model()
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "the model is compiled, so changes to it would not be seen or would compile it anew. "
            "Steer the model that was given to torch.compile (compiled._orig_mod)."
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model. Pass the object that "
            "AutoModelForImageTextToText.from_pretrained returns, or a PEFT model around it."
        )
    return model


def inspect_model(model: Any) -> ModelInfo:
    """Discover what the engine needs to know about a model.

    Raises:
        UnsupportedModelError: The model has no text decoder with dense attention that goes
            through transformers' attention interface, or no image tokens.
    """
    base = unwrap(model)
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(base).__name__} is an encoder-decoder: its decoder attends to the image "
            "through an encoder. Use a decoder-only vision-language model."
        )
    decoder = _decoder(base)
    found = list(_attention_modules(decoder))
    if not found:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no attention in {type(decoder).__name__} that goes through "
            "transformers' attention interface, so its attention cannot be steered."
        )
    layers = _decoder_layers(decoder, found)
    configs = {id(module.config): module.config for _, module, _ in found}
    if hasattr(getattr(decoder, "config", None), "_attn_implementation"):
        configs.setdefault(id(decoder.config), decoder.config)
    return ModelInfo(
        model=base,
        decoder=decoder,
        owner=_owner(base),
        sites={module: site for _, module, site in found},
        layers=layers,
        mlps={index: mlp for index, layer in layers.items() if (mlp := _mlp(layer)) is not None},
        configs=tuple(configs.values()),
        n_layers=max(layers) + 1,
        image_token_ids=_image_token_ids(base),
        score_options=frozenset(name for _, m, _ in found for name in _score_options(type(m))),
    )


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The text decoder: what the model says it is, else what holds the input embeddings."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    if decoder is not model:
        return decoder
    embeddings = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embeddings), "")
    while name := name.rpartition(".")[0]:
        holder = model.get_submodule(name)
        if next(_attention_modules(holder), None) is not None:
            return holder
    return model


def _attention_modules(decoder: nn.Module) -> Iterator[tuple[str, nn.Module, AttentionSite]]:
    for name, module in decoder.named_modules():
        if not _dispatches_attention(type(module)):
            continue
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and hasattr(module, "config"):
            axis: Literal["self", "cross"] = "cross" if _is_cross(name, module) else "self"
            yield name, module, AttentionSite(layer, axis)


def _dispatches_attention(cls: type[nn.Module]) -> bool:
    """Whether the forward of a module, or a method beside it, looks up the attention function."""
    methods = [value for value in (cls.forward, *vars(cls).values()) if inspect.isfunction(value)]
    codes = [getattr(inspect.unwrap(method), "__code__", None) for method in methods]
    return any(code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def _is_cross(name: str, module: nn.Module) -> bool:
    return (
        "cross_attention_states" in inspect.signature(type(module).forward).parameters
        or getattr(module, "is_cross_attention", False)
        or _CROSS.search(name.rpartition(".")[2]) is not None
    )


def _decoder_layers(
    decoder: nn.Module, found: list[tuple[str, nn.Module, AttentionSite]]
) -> dict[int, nn.Module]:
    """Decoder layers by index: those around an attention module and their neighbours in the list.

    The neighbours are layers without softmax attention, such as linear attention.
    """
    layers: dict[int, nn.Module] = {}
    for name, _, site in found:
        *parts, _ = name.split(".")
        place = max((i for i, part in enumerate(parts) if part.isdecimal()), default=None)
        if place is None:
            layers.setdefault(site.layer, decoder.get_submodule(".".join(parts)))
            continue
        offset = site.layer - int(parts[place])
        for index, layer in decoder.get_submodule(".".join(parts[:place])).named_children():
            if index.isdecimal() and int(index) + offset >= 0:
                layers.setdefault(int(index) + offset, layer)
    return layers


def _mlp(layer: nn.Module) -> nn.Module | None:
    children = dict(layer.named_children())
    return next((module for name, module in children.items() if _MLP.fullmatch(name)), None)


def eager_function(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """The eager attention function that transformers keeps beside an attention class."""
    for base in cls.__mro__:
        eager = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager  # type: ignore[no-any-return]
    return None


def _score_options(cls: type[nn.Module]) -> set[str]:
    eager = eager_function(cls)
    return set() if eager is None else set(inspect.signature(eager).parameters) - _PLAIN_OPTIONS


def _owner(model: PreTrainedModel) -> nn.Module:
    """The model whose forward a generation loop calls.

    That is the model itself, unless its own ``generate`` hands over to the language model inside.
    """
    usual = GenerationMixin.generate
    generate = inspect.unwrap(getattr(type(model), "generate", usual))
    if generate is inspect.unwrap(usual) or "super" in generate.__code__.co_names:
        return model
    inner = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.can_generate() and _has_head(module)
    ]
    return inner[-1] if inner else model


def _has_head(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings() is not None  # type: ignore[no-untyped-call]


def _ids_named(model: PreTrainedModel, names: "re.Pattern[str]") -> set[int]:
    """Token ids in the configurations of a model under such names."""
    parts = (model.config, model.config.get_text_config(decoder=True), model.generation_config)
    values = [v for part in parts for name, v in vars(part).items() if names.fullmatch(name)]
    listed = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return {v for v in listed if isinstance(v, int) and v >= 0}


def _image_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    config = model.config
    found = _ids(config, _IMAGE_TOKEN_NAMES)
    if not found:
        parts = (config, *(p for p in vars(config).values() if isinstance(p, PreTrainedConfig)))
        for part in parts:
            names = filter(_LIKE_AN_IMAGE_TOKEN.fullmatch, dir(part))
            found += _ids(part, [name for name in names if not _BESIDE_THE_IMAGE.search(name)])
    if not found and not any(is_place_mask(name) for name in _forward_arguments(model)):
        raise UnsupportedModelError(
            f"{type(model).__name__} ({config.model_type}) names no image token in its "
            f"configuration (looked for {', '.join(_IMAGE_TOKEN_NAMES)} and the like), so image "
            "tokens cannot be told from text. Is it a vision-language model?"
        )
    return tuple(dict.fromkeys(found))


def _ids(config: Any, names: Iterable[str]) -> list[int]:
    """The token ids among attributes of a configuration."""
    values = [getattr(config, name, None) for name in names]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _forward_arguments(model: PreTrainedModel) -> list[str]:
    return list(inspect.signature(model.forward).parameters)
