"""SPIN where its effect is known in advance."""

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.families import zoo
from tests.methods.views import GENERATED, IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer.errors import ConfigError
from vlm_steer.functional import spin_gate
from vlm_steer.methods.spin import SPIN

KINDS = [SYSTEM, IMAGE, IMAGE, INSTRUCTION, GENERATED]


def inputs_of_output_projections(family: zoo.Family, batch: dict[str, Tensor]) -> list[Tensor]:
    """Head outputs of every layer over a prompt, ``[batch, rows, heads * head_dim]``."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for name, module in family.model.get_decoder().named_modules()
        if name.endswith("o_proj")
    ]
    with torch.no_grad():
        family.model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("score", ["prob_mass", "logit_sum"])
def test_the_gates_of_a_model_are_those_of_its_eager_attention(score: str) -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs(n_text=5), family.inputs(n_text=9, seed=1)])
    eager = zoo.load("llava", attn_implementation="eager").model
    with torch.no_grad():
        weights = eager(**batch, output_attentions=True).attentions[0][:, :, -1]
    base = inputs_of_output_projections(family, batch)[0]
    method = {"method": "spin", "keep_ratio": 0.5, "suppress": 0.25, "score": score}
    with vlm_steer.steer(family.model, method):
        steered = inputs_of_output_projections(family, batch)[0]
    assert torch.equal(steered[:, :-1], base[:, :-1])
    factor = (steered[:, -1] / base[:, -1]).unflatten(-1, (zoo.HEADS, -1)).round(decimals=4)
    gates = factor[..., 0]
    assert (factor == gates[..., None]).all()
    assert gates.sort(dim=-1).values.tolist() == [[0.25, 0.25, 1.0, 1.0]] * 2
    if score == "prob_mass":
        is_image = family.expected_image_mask(batch)
        expected = spin_gate(weights, is_image, keep_ratio=0.5, suppress=0.25)
        assert torch.equal(gates, expected)


def test_scores_and_weights_can_rank_heads_differently() -> None:
    # Head 0 has the larger scores on the image, head 1 the larger share of its attention.
    scores = torch.tensor([[5.0, 1.0, 1.0, 5.0, 5.0], [0.0, 0.5, 0.5, 0.0, 0.0]])[None, :, None]
    weights = scores.softmax(dim=-1)
    by_share = SPIN(keep_ratio=0.5, suppress=0.1).look(scores, weights, view(KINDS))
    by_sum = SPIN(keep_ratio=0.5, suppress=0.1, score="logit_sum").look(
        scores, weights, view(KINDS)
    )
    torch.testing.assert_close(by_share, torch.tensor([[[0.1, 1.0]]]))
    torch.testing.assert_close(by_sum, torch.tensor([[[1.0, 0.1]]]))


def test_every_row_has_its_own_gate() -> None:
    weights = torch.rand(1, 8, 3, 5).softmax(dim=-1)
    at = view(KINDS, rows=3)
    together = SPIN(keep_ratio=0.5).look(weights, weights, at)
    for row in range(3):
        alone = SPIN(keep_ratio=0.5).look(weights[:, :, row, None], weights[:, :, row, None], at)
        assert torch.equal(together[:, row], alone[:, 0])


def test_a_row_that_sees_no_image_keeps_all_of_its_heads() -> None:
    weights = torch.rand(1, 4, 1, 5).softmax(dim=-1)
    assert (SPIN().look(weights, weights, view([SYSTEM] * 5)) == 1).all()
    weights[..., 1:3] = 0  # a window that has left the image behind
    assert (SPIN().look(weights, weights, view(KINDS)) == 1).all()


@pytest.mark.parametrize(("option", "value"), [("keep_ratio", 1.2), ("suppress", -0.1)])
def test_a_number_outside_its_range_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        SPIN(**{option: value})
