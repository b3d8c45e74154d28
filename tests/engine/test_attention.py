"""Cost and correctness of THE attention function."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlm_steer
from tests.contract.settings import ACTIVE
from tests.families import zoo
from vlm_steer.engine import attention
from vlm_steer.engine.hooks import At, Method, Rows
from vlm_steer.errors import SteerError, UnsupportedModelError


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, torch.Tensor) and item.untyped_storage().nbytes() > 0:
                held = item.untyped_storage().nbytes() // item.element_size()
                self.numel = max(self.numel, held)
        return out


@pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")
@pytest.mark.parametrize("setting", ["pai", "var", "vhr", "mma", "vaf", "lookback_ratio"])
def test_no_tensor_of_a_long_prefill_has_heads_times_sequence_squared_entries(
    setting: str,
) -> None:
    heads, side = 4, 60
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=2 * side,
            patch_size=2,
        ),
        text_config=LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=8192,
            eos_token_id=None,
        ),
        image_token_id=3,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"vision_config": "sdpa", "text_config": "sdpa"})
    text = torch.arange(200) % 20 + 8
    ids = torch.cat([text[:100], torch.full((side * side,), 3), text[100:], text])[None]
    length = ids.shape[1]
    assert length == 4000
    pixels = torch.randn(1, 3, 2 * side, 2 * side)
    largest = LargestTensor()
    with (
        vlm_steer.steer(model, {**ACTIVE[setting], "layers": "all"}) as steering,
        torch.no_grad(),
        largest,
    ):
        model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
    assert setting == "lookback_ratio" or steering.effect()[setting]["layers"]
    # MMA may hold one mask that all heads share; everything else stays linear in the prompt.
    assert largest.numel <= (length * length if setting == "mma" else 64 * heads * length)


def test_idle_layers_return_the_kernels_result_bitwise() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs()])
    with torch.no_grad():
        base = family.model(**batch, output_hidden_states=True).hidden_states
        with vlm_steer.steer(family.model, {"method": "pai", "gamma": 1.0, "layers": [3, 4]}):
            steered = family.model(**batch, output_hidden_states=True).hidden_states
    for layer in range(4):
        assert torch.equal(base[layer], steered[layer])
    assert not torch.equal(base[4], steered[4])


def test_only_the_claimed_rows_change() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs()])
    with torch.no_grad():
        base = family.model(**batch).logits
        with vlm_steer.steer(family.model, {"method": "pai", "gamma": 1.0}):
            steered = family.model(**batch).logits
    assert torch.equal(base[:, :-1], steered[:, :-1])
    assert not torch.equal(base[:, -1], steered[:, -1])


def test_an_attention_implementation_that_is_not_supported_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        attention.key_for("flex_attention")


def test_registered_names_bring_their_masks() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for implementation in ("sdpa", "eager"):
        key = attention.key_for(implementation)
        assert key in ALL_ATTENTION_FUNCTIONS.valid_keys()
        assert key in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
        assert not any(word in key for word in ("/", "flash", "sdpa"))
        assert attention.base_name(key) == implementation


@dataclass(frozen=True, kw_only=True)
class Foreseeing(Method):
    """Keeps the weights that its scores hook foresees, and those that its weights hook gets."""

    name: ClassVar[str] = "foreseeing"
    rows: ClassVar[Rows] = "text"
    seen: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"before": [], "after": []})

    def scores(self, scores: torch.Tensor, at: At) -> torch.Tensor:
        boosted = scores + 1.0 * at.columns.is_image[:, None, None]
        self.seen["before"].append(at.softmax(boosted) * at.is_row[:, None, :, None])
        return boosted

    def weights(self, weights: torch.Tensor, at: At) -> torch.Tensor:
        self.seen["after"].append(weights * at.is_row[:, None, :, None])
        with pytest.raises(SteerError, match="scores hook"):
            at.softmax(weights)
        return weights


@pytest.mark.parametrize("name", ["llava", "gemma3"])  # without and with a soft cap and windows
def test_the_scores_hook_can_foresee_the_weights_of_its_rows(name: str) -> None:
    family = zoo.load(name)
    batch = family.batch([family.inputs(n_text=5), family.inputs(n_text=9, seed=1)])
    method = Foreseeing()
    with vlm_steer.steer(family.model, method):
        family.model.generate(**batch, max_new_tokens=3, do_sample=False)
    before, after = method.seen["before"], method.seen["after"]
    assert len(before) == len(after) > 4
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
