"""PAINT where its effect is known in advance."""

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.families import zoo
from tests.methods.views import GENERATED, IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer.engine.hooks import Reference
from vlm_steer.errors import ConfigError, UnsupportedModelError
from vlm_steer.functional import InformedTokens, paint_tokens
from vlm_steer.methods.paint import PAINT

KINDS = [SYSTEM, IMAGE, IMAGE, IMAGE, INSTRUCTION, GENERATED]
TOKENS = InformedTokens(
    local=torch.tensor([[False, True, False, False, False, False]]),
    summary=torch.tensor([[False, False, True, False, False, False]]),
)


def test_local_and_summary_columns_grow_by_their_own_strengths() -> None:
    scores = torch.tensor([1.0, -1.0, 2.0, 3.0, -1.0, 1.0]).expand(1, 2, 1, 6)
    steered = PAINT().scores(scores, view(KINDS, prepared=TOKENS))
    expected = torch.tensor([1.0, -0.3, 2.6, 3.0, -1.0, 1.0]).expand(1, 2, 1, 6)
    torch.testing.assert_close(steered, expected)


def test_sensitivity_deals_the_strength_out_to_the_heads_that_look_at_the_image() -> None:
    scores = torch.zeros(1, 2, 1, 6)
    scores[0, 0, 0, 1], scores[0, 1, 0, 0] = 9.0, 9.0  # head 0 looks at the image, head 1 does not
    at = view(KINDS, prepared=TOKENS)
    plain = PAINT().scores(scores, at) - scores
    dealt = PAINT(head_modulation="sensitivity").scores(scores, at) - scores
    assert dealt[0, 0, 0, 1] > 1.9 * plain[0, 0, 0, 1] > 0
    scores[0, 1, 0, 1] = 1.0
    plain = PAINT().scores(scores, at) - scores
    dealt = PAINT(head_modulation="sensitivity").scores(scores, at) - scores
    assert dealt[0, 1, 0, 1] < 0.1 * plain[0, 1, 0, 1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_tokens_of_a_clip_model_are_those_of_its_own_attentions(implementation: str) -> None:
    family = zoo.load("llava", attn_implementation=implementation)
    eager = zoo.load("llava", attn_implementation="eager").model
    batch = family.batch([family.inputs(n_text=5), family.inputs(n_text=9, seed=1)])
    tower = eager.model.vision_tower
    with torch.no_grad():
        seen = tower(batch["pixel_values"], output_attentions=True).attentions
    expected = paint_tokens(seen[0][:, :, 0, 1:], seen[-2][:, :, 0, 1:], local_ratio=0.25)
    chosen = tokens_chosen(family, batch)
    is_image = family.expected_image_mask(batch)
    for found, wanted in zip(chosen, expected, strict=True):
        assert torch.equal(found[is_image], wanted.flatten())
        assert not found[~is_image].any()


@pytest.mark.parametrize("name", ["paligemma", "gemma3", "internvl", "idefics3"])
def test_the_tokens_of_an_image_do_not_depend_on_the_batch(name: str) -> None:
    family = zoo.load(name)
    rows = [family.inputs(n_text=5), family.inputs(n_text=9, seed=1)]
    together = tokens_chosen(family, family.batch(rows))
    for index, row in enumerate(rows):
        alone = tokens_chosen(family, family.batch([row]))
        is_image = family.expected_image_mask(row)
        n_tokens = is_image.shape[1]
        for found, wanted in zip(together, alone, strict=True):
            assert torch.equal(found[index : index + 1, -n_tokens:], wanted)
        share = alone.local[is_image].float().mean() + alone.summary[is_image].float().mean()
        assert 0.1 < share <= 0.5


def test_every_image_of_a_prompt_has_its_own_tokens() -> None:
    family = zoo.load("llava")
    row = family.inputs(images=2)
    chosen = tokens_chosen(family, family.batch([row]))
    is_image = family.expected_image_mask(row)
    for image, local in enumerate(chosen.local[is_image].chunk(2)):
        single = {**family.inputs(images=1), "pixel_values": row["pixel_values"][image, None]}
        alone = tokens_chosen(family, family.batch([single]))
        assert torch.equal(local, alone.local[family.expected_image_mask(single)])


def test_beams_share_the_tokens_of_their_image() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs(n_text=5), family.inputs(n_text=9, seed=1)])
    single = tokens_chosen(family, batch)
    beams = tokens_chosen(family, batch, num_beams=3)
    assert torch.equal(beams.local, single.local.repeat_interleave(3, dim=0))


def tokens_chosen(
    family: zoo.Family, batch: dict[str, Tensor], **options: object
) -> InformedTokens:
    """What PAINT prepares for a generation."""
    prepared = []

    class Spy(PAINT):
        def prepare(self, reference: Reference) -> InformedTokens:
            prepared.append(super().prepare(reference))
            return prepared[0]

    with vlm_steer.steer(family.model, Spy()):
        family.model.generate(**batch, max_new_tokens=1, do_sample=False, **options)
    return prepared[0]


def test_too_few_pixels_for_the_prompt_are_an_error_that_says_so() -> None:
    family = zoo.load("llava")
    row = family.inputs(images=2)
    row["pixel_values"] = row["pixel_values"][:1]
    with (
        vlm_steer.steer(family.model, "paint"),
        pytest.raises(UnsupportedModelError, match="16 image tokens, but the prompt holds 32"),
    ):
        family.model.generate(**family.batch([row]), max_new_tokens=1)


def test_local_ratio_without_local_strength_is_refused() -> None:
    with pytest.raises(ConfigError, match="local_ratio has no effect"):
        PAINT(alpha=0.0, local_ratio=0.1)


@pytest.mark.parametrize(
    ("option", "value"), [("alpha", -0.1), ("beta", -1.0), ("local_ratio", 1.5)]
)
def test_a_number_outside_its_range_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        PAINT(**{option: value})
