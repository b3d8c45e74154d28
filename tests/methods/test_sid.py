"""SID against a plain implementation of it, by hooks on an eager model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlm_steer
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from tests.methods.streams import recorded
from vlm_steer.errors import ConfigError
from vlm_steer.methods.rbd import RBD
from vlm_steer.methods.sid import SID
from vlm_steer.methods.vcd import VCD

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

FIRST = 2


def pruned(
    family: zoo.Family, batch: dict[str, Tensor], tokens: Tensor, keep: int, *, largest: bool
) -> Tensor:
    """Logits after ``tokens``, decoded one by one with image columns closed from layer 2 on."""
    model = copy.deepcopy(family.model)
    model.set_attn_implementation("eager")
    is_image = family.expected_image_mask(batch)
    is_closed: list[Tensor] = []

    def choose(module: nn.Module, args: Any, output: Any) -> None:
        attention = output[1].mean(dim=1)[:, -1]
        width = is_image.shape[1]
        seen = attention[:, :width].masked_fill(~is_image, -1 if largest else 2)
        chosen = torch.zeros_like(is_image)
        chosen.scatter_(1, seen.topk(keep, dim=-1, largest=largest).indices, True)
        closed = torch.zeros_like(attention, dtype=torch.bool)
        closed[:, :width] = is_image & ~chosen
        is_closed[:] = [closed]

    def close(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        return args, {
            **kwargs,
            "attention_mask": mask.masked_fill(
                is_closed[0][:, None, None], torch.finfo(mask.dtype).min
            ),
        }

    layers = model.model.language_model.layers
    layers[FIRST - 1].self_attn.register_forward_hook(choose)
    for layer in layers[FIRST:]:
        layer.register_forward_pre_hook(close, with_kwargs=True)
    mask = batch["attention_mask"]
    with torch.no_grad():
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = model(**batch, position_ids=positions, use_cache=True)
        for token in tokens.unbind(dim=1):
            mask = torch.cat([mask, torch.ones_like(token[:, None])], dim=1)
            positions = mask.sum(dim=1, keepdim=True) - 1
            output = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=output.past_key_values,
            )
    return output.logits[:, -1:]


@pytest.mark.parametrize("backend", ["paired", "separate"])
def test_the_negative_stream_sees_the_least_attended_tokens_only(backend: str) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    method = SID(alpha=0.5, keep=4, layers=(FIRST, None))
    tokens, seen = recorded(family, method, batch, max_new_tokens=4, backend=backend)
    expected = pruned(family, batch, tokens[:, :3], 4, largest=False)
    assert_close(seen[3]["pruned"][:, None], expected)


def test_the_visual_stream_of_rbd_sees_the_most_attended_tokens_only() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    method = RBD(keep=4, layers=(FIRST, None))
    tokens, seen = recorded(family, method, batch, max_new_tokens=4)
    expected = pruned(family, batch, tokens[:, :3], 4, largest=True)
    assert_close(seen[3]["visual"][:, None], expected)


def test_rbd_takes_off_the_text_and_adds_the_image_at_unit_weight() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    tokens, seen = recorded(family, RBD(alpha=0.5, gamma=0.25, beta=0.0), batch, max_new_tokens=1)
    step = seen[0]
    expected = 1.25 * step[None] - 0.5 * step["noised"] + 0.25 * step["visual"]
    assert torch.equal(expected.argmax(dim=-1), tokens[:, 0])
    _, of_vcd = recorded(family, VCD(), batch, max_new_tokens=1)
    torch.testing.assert_close(step["noised"], of_vcd[0]["noised"], atol=1e-4, rtol=1e-4)


def test_keeping_every_token_leaves_the_second_stream_like_the_first() -> None:
    family = zoo.load("llava")
    _, seen = recorded(family, SID(keep=10**6), two_rows(family), max_new_tokens=3)
    for step in seen:
        torch.testing.assert_close(step["pruned"], step[None], atol=1e-4, rtol=1e-4)


def test_the_streams_of_other_methods_are_not_pruned() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    _, alone = recorded(family, VCD(), batch, max_new_tokens=1)
    seen: list[Tensor] = []

    class Recording(VCD):
        def logits(self, logits: Tensor, at: Any) -> Tensor:
            seen.append(at.branches["noised"])
            return super().logits(logits, at)

    with vlm_steer.steer(family.model, ["sid", Recording()]):
        generate(family, batch, max_new_tokens=1)
    torch.testing.assert_close(seen[0], alone[0]["noised"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [0, 0.0, 1.0, -3])
def test_a_share_that_keeps_nothing_or_everything_is_refused(keep: float) -> None:
    with pytest.raises(ConfigError, match="keep"):
        SID(keep=keep)
