"""AvisC against the model itself with blanked image features."""

import copy

import pytest
import torch

import vlm_steer
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from tests.methods.streams import recorded
from vlm_steer import functional
from vlm_steer.errors import ConfigError
from vlm_steer.methods.avisc import AvisC

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")


@pytest.mark.parametrize("blank", ["zeros", "ones"])
def test_the_negative_stream_is_the_model_with_all_but_the_blind_tokens_blanked(blank: str) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    method = AvisC(alpha=0.5, lam=0.5, gamma=0.6, blank=blank)
    tokens, seen = recorded(family, method, batch, max_new_tokens=4)
    plain = copy.deepcopy(family.model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        weights = plain(**batch, output_attentions=True).attentions
        rows = torch.stack([layer[:, :, -1] for layer in weights], dim=1)
        is_image = family.expected_image_mask(batch)
        is_blind = functional.blind_tokens(rows, is_image, gamma=0.6, lam=0.5)
        assert (is_image & is_blind).any()
        assert (is_image & ~is_blind).any()
        features = plain.model.get_image_features(batch["pixel_values"], return_dict=True)
        blanked = torch.stack(list(features.pooler_output))
        is_blank = ~is_blind[is_image].reshape(*blanked.shape[:2])
        features.pooler_output = list(
            blanked.masked_fill(is_blank[:, :, None], float(blank == "ones"))
        )
        ids = torch.cat([batch["input_ids"], tokens[:, :3]], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens[:, :3])], dim=1)
        expected = plain(
            input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": features}
        ).logits[:, -1:]
    assert_close(seen[3]["blind"][:, None], expected)


def test_the_image_is_encoded_once() -> None:
    family = zoo.load("llava")
    calls: list[int] = []
    hook = family.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        with vlm_steer.steer(family.model, "avisc+sid"):
            generate(family, two_rows(family))
    finally:
        hook.remove()
    assert calls == [1]


def test_a_threshold_that_every_token_passes_leaves_the_second_stream_like_the_first() -> None:
    family = zoo.load("llava")
    _, seen = recorded(family, AvisC(lam=-100.0), two_rows(family), max_new_tokens=2)
    for step in seen:
        torch.testing.assert_close(step["blind"], step[None], atol=1e-4, rtol=1e-4)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="gamma"):
        AvisC(gamma=0.0)
