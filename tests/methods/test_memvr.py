"""MemVR where its effect is known in advance."""

import copy

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import generate, two_rows
from tests.families import zoo
from tests.methods.views import GENERATED, IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer.errors import ConfigError, UnsupportedModelError
from vlm_steer.functional import memvr_retrace, retrace_uncertainty
from vlm_steer.methods.memvr import MemVR

KINDS = [SYSTEM, IMAGE, IMAGE, INSTRUCTION, GENERATED, GENERATED]
PROMPT = 4

SURE, UNSURE = -1.0, 1.0


def to_logits(hidden: Tensor, *, normed: bool = True, mean: bool = False) -> Tensor:
    """An even spread over 20 tokens where the first feature is positive, one token elsewhere."""
    sure = torch.where(torch.arange(20) == 3, 50.0, 0.0)
    return torch.where(hidden[..., :1] > 0, 0.0, sure)


def states(*per_row: float) -> Tensor:
    """``[1, rows, 2]`` hidden states that make rows sure or unsure."""
    return torch.tensor(per_row)[None, :, None].expand(1, len(per_row), 2)


def carry(method: MemVR, layers: list[Tensor], **fields: object) -> list[list[int]]:
    at = view(KINDS, rows=len(KINDS), prompt_rows=PROMPT, to_logits=to_logits, **fields)
    carried, seen = None, []
    for hidden in layers:
        carried = method.carry(hidden, carried, at)
        seen.append(carried[0].tolist())
    return seen


def test_the_first_unsure_layer_fires_once_and_the_last_prompt_row_decides_for_the_prompt() -> None:
    seen = carry(
        MemVR(),
        [
            states(UNSURE, UNSURE, UNSURE, SURE, SURE, UNSURE),
            states(SURE, SURE, SURE, UNSURE, SURE, UNSURE),
            states(SURE, SURE, SURE, UNSURE, UNSURE, SURE),
        ],
    )
    assert seen == [[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 2], [2, 2, 2, 2, 1, 2]]


def test_a_pass_of_generated_tokens_alone_lets_each_decide_for_itself() -> None:
    at = view(KINDS, rows=2, prompt_rows=0, to_logits=to_logits)
    assert MemVR().carry(states(UNSURE, SURE), None, at).tolist() == [[1, 0]]


def test_an_even_spread_passes_every_threshold_below_one_and_a_certain_one_none() -> None:
    logits = to_logits(states(UNSURE, SURE)[0])
    torch.testing.assert_close(retrace_uncertainty(logits), torch.tensor([1.0, 0.0]))


def test_rows_that_fire_get_the_look_up_and_the_others_stay_bitwise() -> None:
    given, output, memory = torch.randn(1, 6, 8), torch.randn(1, 6, 8), torch.randn(1, 2, 8)
    fields = {"prompt_rows": PROMPT, "mlp_input": given, "image_features": memory}
    at = view(KINDS, rows=6, carried=torch.tensor([[1, 1, 1, 1, 0, 1]]), **fields)
    new = MemVR(alpha=0.3).mlp(output, at)
    prompt = memvr_retrace(given[:, :4], output[:, :4], memory, ratio=0.3, activation="silu")
    last = memvr_retrace(given[:, 5:], output[:, 5:], memory, ratio=0.3, activation="silu")
    assert torch.equal(new, torch.cat([prompt, output[:, 4:5], last], dim=1))


def test_a_row_without_an_image_is_left_alone_beside_one_with_an_image() -> None:
    given, output = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    memory = torch.stack([torch.randn(3, 8), torch.zeros(3, 8)])
    at = view(
        KINDS, carried=torch.ones(2, 1), mlp_input=given, image_features=memory, prompt_rows=0
    )
    new = MemVR(alpha=0.3).mlp(output, at)
    assert torch.equal(new[1], output[1])
    assert not torch.equal(new[0], output[0])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_image_is_looked_up_in_what_the_projector_returned(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    embeds: list[Tensor] = []
    seen: list[Tensor] = []
    hook = family.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )

    class Spy(MemVR):
        def mlp(self, output: Tensor, at: object) -> Tensor:
            seen.append(at.image_features)
            return super().mlp(output, at)

    with torch.no_grad(), vlm_steer.steer(family.model, Spy(layers="all")):
        family.model(**batch)
    hook.remove()
    is_image = family.expected_image_mask(batch)
    for row in range(2):
        assert torch.equal(seen[-1][row], embeds[-1][row][is_image[row]])


def test_a_cache_that_holds_an_image_unseen_by_the_method_is_refused() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs()])
    cache = family.model(**batch, use_cache=True).past_key_values
    more = torch.full((1, 2), 5)
    ids = torch.cat([batch["input_ids"], more], dim=1)
    mask = torch.ones_like(ids)
    with (
        vlm_steer.steer(family.model, "memvr"),
        pytest.raises(UnsupportedModelError, match="image's embeddings"),
    ):
        family.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2
        )


def test_a_conversation_goes_on_with_the_image_of_its_first_turn() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs()])
    method = {"method": "memvr", "alpha": 0.3, "threshold": 0.05, "layers": "all"}
    with vlm_steer.steer(family.model, method):
        first = family.model.generate(
            **batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([first.sequences, torch.full((1, 3), 5)], dim=1)
        follow = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options = {"max_new_tokens": 2, "past_key_values": first.past_key_values}
        base = copy.deepcopy(options["past_key_values"])
        steered = generate(family, follow, **options)
    unsteered = generate(family, follow, **options | {"past_key_values": base})
    assert not torch.allclose(steered, unsteered, atol=1e-3)


@pytest.mark.parametrize(("option", "value"), [("alpha", 1.2), ("threshold", -0.1)])
def test_a_number_outside_its_range_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        MemVR(**{option: value})
