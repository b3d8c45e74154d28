"""What the engine knows about a model, discovered from the model itself.

Nothing here is a table of model families: the decoder, its attention modules, the layers around
them and the image token ids are read off the loaded model.
"""

import inspect
import re
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_steer.engine.active import ACTIVE, AttentionSite, Probe
from vlm_steer.engine.grid import Geometry, geometry_of
from vlm_steer.engine.readout import Readout, find_readout
from vlm_steer.engine.vision import why_no_image_attention
from vlm_steer.errors import UnsupportedModelError

_REMEMBERED: "weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Any]]" = (
    weakref.WeakKeyDictionary()
)
T = TypeVar("T")

__all__ = ["AttentionSite", "ModelInfo", "inspect_model", "kept_module_state", "unwrap"]

_IMAGE_TOKEN_NAMES = (
    "image_token_id",
    "image_token_index",
    "media_token_id",
    "media_placeholder_token_id",
    "video_token_id",
    "video_token_index",
)


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
        n_layers: Depth of the decoder.
        image_token_ids: Token ids that stand for image (or video frame) features.
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
        """
        ids = self.text_only_prompt(n_tokens)
        token = ACTIVE.set(Probe())
        try:
            with torch.no_grad():
                output = self.decoder(input_ids=ids, output_hidden_states=True, use_cache=False)
        finally:
            ACTIVE.reset(token)
        states: tuple[Tensor, ...] = output.hidden_states
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
    if base.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(base).__name__} is an encoder-decoder: its decoder attends to the image "
            "through an encoder. Use a decoder-only vision-language model."
        )
    decoder: nn.Module = base.get_decoder()  # type: ignore[no-untyped-call]
    sites = {module: site for _, module, site in _attention_modules(decoder)}
    if not sites:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no attention in {type(decoder).__name__} that goes through "
            "transformers' attention interface, so its attention cannot be steered."
        )
    layers, mlps = _decoder_layers(decoder)
    configs = {id(module.config): module.config for module in sites}
    configs.setdefault(id(decoder.config), decoder.config)
    return ModelInfo(
        model=base,
        decoder=decoder,
        owner=_owner(base),
        sites=sites,
        layers=layers,
        mlps=mlps,
        configs=tuple(configs.values()),
        n_layers=max(site.layer for site in sites.values()) + 1,
        image_token_ids=_image_token_ids(base),
    )


def _attention_modules(decoder: nn.Module) -> Iterator[tuple[str, nn.Module, AttentionSite]]:
    for name, module in decoder.named_modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and _dispatches_attention(type(module)):
            axis: Literal["self", "cross"] = "cross" if _is_cross(type(module)) else "self"
            yield name, module, AttentionSite(layer, axis)


def _dispatches_attention(cls: type[nn.Module]) -> bool:
    forward = inspect.unwrap(cls.forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _is_cross(cls: type[nn.Module]) -> bool:
    return "cross_attention_states" in inspect.signature(cls.forward).parameters


def _decoder_layers(decoder: nn.Module) -> tuple[dict[int, nn.Module], dict[int, nn.Module]]:
    layers: dict[int, nn.Module] = {}
    mlps: dict[int, nn.Module] = {}
    for name, _, site in _attention_modules(decoder):
        layer = decoder.get_submodule(name.rpartition(".")[0])
        layers[site.layer] = layer
        for child_name, child in layer.named_children():
            if child_name in ("mlp", "feed_forward", "ffn", "block_sparse_moe"):
                mlps[site.layer] = child
    return layers, mlps


def _owner(model: PreTrainedModel) -> nn.Module:
    """The innermost model with a language head, which is the one whose loop runs."""
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
    found = []
    for name in _IMAGE_TOKEN_NAMES:
        value = getattr(model.config, name, None)
        if isinstance(value, int) and value >= 0:
            found.append(value)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type}) names no image token in its "
            f"configuration (looked for {', '.join(_IMAGE_TOKEN_NAMES)}), so image tokens cannot "
            "be told from text. Is it a vision-language model?"
        )
    return tuple(dict.fromkeys(found))
