"""A model that transformers does not know, with names of its own, is steered without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlm_steer
from tests.contract.settings import HOOKS, EveryRow
from vlm_steer.engine.model import inspect_model

IMAGE, TEXT, WIDTH, HEADS, DEPTH = 3, 40, 16, 2, 3


class StrangerConfig(PreTrainedConfig):
    model_type = "stranger"

    def __init__(self, **options: Any) -> None:
        self.vocab_size, self.hidden_size = 64, WIDTH
        self.num_attention_heads, self.num_hidden_layers = HEADS, DEPTH
        self.img_context_token_id, self.img_start_token_id = IMAGE, 5
        super().__init__(**options)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class Mixer(nn.Module):
    """Attention whose look-up of the attention function is not in its forward."""

    def __init__(self, config: StrangerConfig, index: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.num_key_value_groups = config, index, 1
        self.is_causal = True
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def attend(self, *tensors: Tensor | None) -> Tensor:
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        outputs: Tensor = function(self, *tensors, scaling=(WIDTH // HEADS) ** -0.5)[0]
        return outputs

    def forward(self, states: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        shape = (*states.shape[:2], HEADS, WIDTH // HEADS)
        query, key, value = (t.view(shape).transpose(1, 2) for t in self.qkv(states).chunk(3, -1))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return self.out(self.attend(query, key, value, mask).reshape(states.shape))


class Inner(nn.Module):
    def __init__(self, config: StrangerConfig, index: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixer = Mixer(config, index)


class Stage(nn.Module):
    """A layer that keeps its attention one module deeper than usual."""

    def __init__(self, config: StrangerConfig, index: int) -> None:
        super().__init__()
        self.inner = Inner(config, index)
        self.text_ffn = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, hidden_states: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        inner = self.inner
        hidden_states = hidden_states + inner.mixer(inner.norm(hidden_states), mask, cache)
        return hidden_states + self.text_ffn(hidden_states)


class Tower(nn.Module):
    def __init__(self, config: StrangerConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(64, WIDTH)
        self.stages = nn.ModuleList(Stage(config, i) for i in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)


class Stranger(PreTrainedModel, GenerationMixin):
    config_class = StrangerConfig
    _supports_sdpa = True
    main_input_name = "input_ids"

    def __init__(self, config: StrangerConfig) -> None:
        super().__init__(config)
        self.eyes = nn.Linear(3, WIDTH)
        self.tower = Tower(config)
        self.head = nn.Linear(WIDTH, 64)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.words

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        states = self.tower.words(input_ids)
        if images is not None:
            features = self.eyes(images.flatten(2).transpose(1, 2))
            states = states.masked_scatter((input_ids == IMAGE)[..., None], features)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        for stage in self.tower.stages:
            states = stage(states, mask, past_key_values)
        logits = self.head(self.tower.norm(states))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        images = kwargs.pop("images", None)
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            inputs["images"] = images
        return inputs


@pytest.fixture
def stranger() -> Stranger:
    return Stranger(StrangerConfig()).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    text = torch.arange(TEXT, TEXT + 4)
    ids = torch.stack([torch.cat([text, torch.full((4,), IMAGE), text + 4])] * 2)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "images": torch.randn(2, 3, 2, 2)}


def generated(model: Stranger, batch: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | options
    out: Any = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, dim=1)


def test_everything_is_found(stranger: Stranger) -> None:
    info = inspect_model(stranger)
    assert info.decoder is stranger.tower
    assert info.image_token_ids == (IMAGE,)
    assert info.layers == dict(enumerate(stranger.tower.stages))
    assert info.mlps == {i: stage.text_ffn for i, stage in enumerate(stranger.tower.stages)}
    assert sorted(site.layer for site in info.sites.values()) == [0, 1, 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_kind_of_hook_acts(
    stranger: Stranger, batch: dict[str, Tensor], attention: str
) -> None:
    stranger.set_attn_implementation(attention)
    base = generated(stranger, batch)
    with vlm_steer.steer(stranger, EveryRow()):
        torch.testing.assert_close(generated(stranger, batch), base, rtol=0, atol=1e-5)
    for hook, method in HOOKS.items():
        with vlm_steer.steer(stranger, method):
            cached, uncached = (generated(stranger, batch, use_cache=c) for c in (True, False))
        assert not torch.equal(cached, base), hook
        torch.testing.assert_close(cached, uncached, rtol=0, atol=1e-4)
    assert torch.equal(generated(stranger, batch), base)


def test_a_changed_image_is_the_only_difference_of_its_branch(
    stranger: Stranger, batch: dict[str, Tensor]
) -> None:
    base = generated(stranger, batch)
    with vlm_steer.steer(stranger, "vcd", backend="separate"):
        separate = generated(stranger, batch)
    with vlm_steer.steer(stranger, "vcd"):
        torch.testing.assert_close(generated(stranger, batch), separate, rtol=0, atol=1e-4)
    assert not torch.equal(separate, base)
