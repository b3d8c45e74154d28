"""GIFT where its effect is known in advance."""

import pytest
import torch

import vlm_steer
from tests.contract.test_contract import two_rows
from tests.families import zoo
from tests.methods.views import GENERATED, IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer.engine.hooks import At, Columns
from vlm_steer.errors import ConfigError
from vlm_steer.functional import gift_fuse, gift_saliency
from vlm_steer.methods.gift import GIFT, _Prepared

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")


def test_the_saliency_is_that_of_the_eager_attention_of_the_gaze_layer() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    seen: list[_Prepared] = []

    class Spy(GIFT):
        def weights(self, weights: torch.Tensor, at: At) -> torch.Tensor:
            seen.append(at.prepared)
            return super().weights(weights, at)

    with torch.no_grad():
        eager = zoo.load("llava", attn_implementation="eager").model
        attention = eager(**batch, output_attentions=True).attentions[1]
        with vlm_steer.steer(family.model, Spy(gaze_layer=1, skip_first=1, skip_last=1)):
            family.model(**batch)
    is_image = family.expected_image_mask(batch)
    for row in range(2):
        last_image = int(is_image[row].nonzero().max())
        question = range(last_image + 2, batch["input_ids"].shape[1] - 1)
        assert seen[0].question[row].nonzero().flatten().tolist() == list(question)
        rises = [
            (attention[row, :, q] - attention[row, :, q - 1]).relu()[:, is_image[row]]
            for q in question
        ]
        shift = torch.stack(rises, dim=1)
        top = shift.sum(dim=(1, 2)).topk(zoo.HEADS // 2).indices
        expected = gift_saliency(shift[top][None], alpha=5.0)
        torch.testing.assert_close(
            seen[0].saliency[row, is_image[row]], expected, atol=1e-3, rtol=1e-3
        )


def test_the_extra_pass_ends_at_the_layer_where_the_gaze_is_followed() -> None:
    family = zoo.load("llava")
    passes: list[int] = []
    for index, layer in enumerate(family.model.get_decoder().layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: passes.append(index))
    with torch.no_grad(), vlm_steer.steer(family.model, GIFT(gaze_layer=1)):
        family.model(**two_rows(family))
    assert sorted(passes) == [0, 0, 1, 2, 3]


def test_every_row_is_fused_by_itself() -> None:
    kinds = [SYSTEM, IMAGE, IMAGE, INSTRUCTION, INSTRUCTION, GENERATED]
    weights = torch.rand(1, 4, 2, 6).softmax(dim=-1)
    saliency = torch.tensor([[1.0, 20.0, 3.0, 1.0, 1.0, 0.0]])
    question = torch.tensor([[False, False, False, True, True, False]])
    at = view(kinds, rows=2, prepared=_Prepared(saliency, question))
    new = GIFT().weights(weights, at)
    for row in range(2):
        expected = gift_fuse(weights[:, :, row], saliency, at.columns.is_image, question)
        assert torch.equal(new[:, :, row], expected)
    torch.testing.assert_close(new.sum(dim=-1), weights.sum(dim=-1))


def test_an_instruction_of_template_alone_counts_as_a_whole() -> None:
    kinds = torch.tensor([[SYSTEM, IMAGE, INSTRUCTION, INSTRUCTION, INSTRUCTION]])
    columns = Columns(kinds)
    assert GIFT()._question(columns).tolist() == [[False, False, True, True, True]]
    skipping = GIFT(skip_first=1, skip_last=1)._question(columns)
    assert skipping.tolist() == [[False, False, False, True, False]]


@pytest.mark.parametrize(
    ("option", "value"), [("alpha", -1.0), ("gaze_layer", 1.5), ("skip_last", -1)]
)
def test_a_number_outside_its_range_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        GIFT(**{option: value})


def test_a_gaze_layer_outside_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="gaze_layer is 99"):
        vlm_steer.attach(zoo.load("llava").model, GIFT(gaze_layer=99))
