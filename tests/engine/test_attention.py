"""Cost and correctness of THE attention function."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlm_steer
from tests.contract.settings import ACTIVE
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from vlm_steer.engine import attention
from vlm_steer.engine.hooks import At, Method, Rows
from vlm_steer.errors import SteerError, UnsupportedModelError
from vlm_steer.registry import get_method, list_methods


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


HOOKS = ("mask", "scores", "tally", "weights", "look", "choose", "heads", "observe")
CONTRASTS = {"avisc", "only", "rbd", "sid"}
ACTS_IN_ATTENTION = [
    name
    for name in list_methods()
    if any(getattr(get_method(name), hook) is not getattr(Method, hook) for hook in HOOKS)
    # Searches read one row, and the heads of decore are named in a file.
    and get_method(name).search is Method.search
    and name != "decore"
]


@pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")
@pytest.mark.parametrize("setting", ACTS_IN_ATTENTION)
def test_no_tensor_of_a_long_prefill_has_heads_times_sequence_squared_entries(
    setting: str,
) -> None:
    heads, side = 4, 60
    depth = 1 if setting in ("pine", "act") else 2  # these go through every row more than once
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=2 * side,
            patch_size=2,
        ),
        text_config=LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=depth,
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
    spec = ACTIVE[setting]
    if setting not in CONTRASTS | {"sham"}:
        spec = {**spec, "layers": "all"}
    if setting == "pine":  # the image in three parts
        spec = {"method": "pine", "segments": [[-3700, -2500], [-2500, -1300], [-1300, -100]]}
    with vlm_steer.steer(model, spec) as steering, torch.no_grad(), largest:
        model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
    assert setting in CONTRASTS | {"lookback_ratio", "sham"} or steering.effect()[setting]["layers"]
    # A mask may be held once for all heads, and the text's attention once; everything else stays
    # linear in the prompt.
    allowed = dict.fromkeys(("mma", "cca", "knockout", "pine", "rbd", "sid"), length * length)
    allowed["cmai"] = 2 * len(text) * length
    assert largest.numel <= allowed.get(setting, 64 * heads * length)


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
    with pytest.raises(UnsupportedModelError, match="flash_attention_2"):
        attention.key_for("flash_attention_2")


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Flex attention without its compiler, which not every machine has and tiny heads may break."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("setting", ["pai", "var", "vhr", "mma", "vcd", "lookback_ratio"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_flex_attention_is_steered_like_sdpa(name: str, setting: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    with vlm_steer.steer(family.model, ACTIVE[setting]):
        expected = generate(family, batch)
    family.model.set_attn_implementation({"text_config": "flex_attention"})
    base = generate(family, batch)
    with vlm_steer.steer(family.model, ACTIVE[setting]) as steering:
        assert steering.status()["attention"] == "flex_attention"
        assert_close(generate(family, batch), expected)
    assert torch.equal(generate(family, batch), base)


def test_registered_names_bring_their_masks() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for implementation in ("sdpa", "eager", "flex_attention"):
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


@dataclass(frozen=True, kw_only=True)
class Looking(Method):
    """Replaces every head output by the head's largest weight, as its look hook saw it."""

    name: ClassVar[str] = "looking"
    rows: ClassVar[Rows] = "after_image"

    def look(self, scores: torch.Tensor, weights: torch.Tensor, at: At) -> torch.Tensor:
        assert scores.shape == weights.shape
        assert at.row_kinds.shape[1] == weights.shape[2] <= 64
        is_open = scores > torch.finfo(scores.dtype).min / 2
        assert torch.equal(is_open[:, 0] & at.is_row[:, :, None], self.is_seen(weights, at))
        return weights.amax(dim=-1).transpose(1, 2)

    @staticmethod
    def is_seen(weights: torch.Tensor, at: At) -> torch.Tensor:
        return (weights > 0).all(dim=1) & at.is_row[:, :, None]

    def heads(self, outputs: torch.Tensor, at: At) -> torch.Tensor:
        assert at.seen is not None
        return at.seen[..., None].expand(outputs.shape).to(outputs.dtype)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_heads_hook_gets_what_the_look_hook_saw_of_the_same_rows(
    dtype: torch.dtype, implementation: str
) -> None:
    eager = zoo.load("llava", dtype, attn_implementation="eager")
    # More text than one block of rows holds, and rows of different length.
    batch = eager.batch([eager.inputs(n_text=150), eager.inputs(n_text=70, seed=1)])
    with torch.no_grad():
        weights = eager.model(**batch, output_attentions=True).attentions[0].float()
    family = zoo.load("llava", dtype, attn_implementation=implementation)
    outputs: list[torch.Tensor] = []
    projection = family.model.get_decoder().layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with vlm_steer.steer(family.model, Looking(layers=(0, 1))) as steering, torch.no_grad():
        family.model(**batch)
        effect = steering.effect()["looking"]["layers"]
        family.model.generate(**batch, max_new_tokens=3, do_sample=False)
    largest = weights.amax(dim=-1).transpose(1, 2)
    steered = outputs[0].unflatten(-1, (zoo.HEADS, -1)).float()
    is_after = torch.zeros(steered.shape[:2], dtype=torch.bool)
    is_after[0, -150:], is_after[1, -70:] = True, True
    expected = largest[..., None].expand(steered.shape)[is_after]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(steered[is_after], expected, rtol=tolerance, atol=tolerance)
    assert not torch.isclose(steered[~is_after], largest[..., None][~is_after]).all()
    assert effect[0]["rows"] == 220


@dataclass(frozen=True, kw_only=True)
class Counting(Method):
    name: ClassVar[str] = "counting"
    rows: ClassVar[Rows] = "last"

    def look(self, scores: torch.Tensor, weights: torch.Tensor, at: At) -> torch.Tensor:
        image = (weights * at.columns.is_image[:, None, None]).sum(dim=-1)
        return image.transpose(1, 2)

    def heads(self, outputs: torch.Tensor, at: At) -> torch.Tensor:
        assert at.seen is not None
        return outputs * at.seen[..., None]


def test_the_look_hook_sees_weights_as_other_methods_leave_them() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs()])
    seen: list[torch.Tensor] = []

    @dataclass(frozen=True, kw_only=True)
    class Blind(Method):
        name: ClassVar[str] = "blind"
        rows: ClassVar[Rows] = "last"

        def weights(self, weights: torch.Tensor, at: At) -> torch.Tensor:
            return weights * ~at.columns.is_image[:, None, None]

    projection = family.model.get_decoder().layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with vlm_steer.steer(family.model, [Counting(), Blind()]), torch.no_grad():
        family.model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert (seen[0][:, -1] == 0).all()
    assert (seen[0][:, :-1] != 0).any()
    assert (seen[1] == 0).all()


@dataclass(frozen=True, kw_only=True)
class Weighing(Method):
    """Keeps the rows of weights that its hooks get, and changes them."""

    name: ClassVar[str] = "weighing"
    rows: ClassVar[Rows] = "text"
    heads_alone: tuple[int, ...] | None = None
    seen: list[torch.Tensor] = field(default_factory=list)

    def own_heads(self, layer: int, plan: Any) -> tuple[int, ...] | None:
        return self.heads_alone

    def tally(self, weights: torch.Tensor, at: At) -> torch.Tensor:
        self.seen.append(weights)
        return weights.sum(dim=(1, 2))

    def weights(self, weights: torch.Tensor, at: At) -> torch.Tensor:
        self.seen.append(weights)
        return weights.flip(-1)


@pytest.mark.parametrize("heads", [None, (0, 2)])
def test_under_autocast_hooks_get_float32_weights_whose_rows_sum_to_one(
    heads: tuple[int, ...] | None,
) -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs(n_text=5), family.inputs(n_text=9, seed=1)])
    method = Weighing(heads_alone=heads)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with vlm_steer.steer(family.model, method), torch.no_grad(), autocast:
        family.model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert len(method.seen) > 4
    for weights in method.seen:
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
