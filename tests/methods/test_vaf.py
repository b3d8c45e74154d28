"""VAF where its effect is known in advance."""

import pytest
import torch

import vlm_steer
from tests.families import zoo
from tests.methods.views import GENERATED, IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer.config import resolve
from vlm_steer.errors import ConfigError
from vlm_steer.functional import row_scores
from vlm_steer.methods.vaf import VAF

KINDS = [SYSTEM, SYSTEM, IMAGE, IMAGE, IMAGE, INSTRUCTION, GENERATED]


def test_the_published_rule_is_a_scaling_of_keys() -> None:
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 7, 8)
    steered = VAF().scores(row_scores(query, key, scale=0.3), view(KINDS, rows=2))
    factor = torch.tensor([0.95, 0.95, 1.15, 1.15, 1.15, 1.0, 1.0])[:, None]
    torch.testing.assert_close(steered, row_scores(query, factor * key, scale=0.3))


def test_magnitudes_raise_the_image_and_lower_the_system_prompt_whatever_the_sign() -> None:
    scores = torch.tensor([-2.0, 2.0, -1.0, 0.5, 3.0, 1.0, -1.0]).expand(1, 1, 1, 7)
    moved = VAF(magnitude=True).scores(scores, view(KINDS)) - scores
    expected = torch.tensor([-0.1, -0.1, 0.15, 0.075, 0.45, 0.0, 0.0])
    torch.testing.assert_close(moved[0, 0, 0], expected)


def test_only_the_heads_that_look_at_the_image_are_acted_on() -> None:
    scores = torch.zeros(1, 4, 1, 7)
    scores[0, [1, 3], 0, 2] = 5.0  # heads 1 and 3 attend to the image
    steered = VAF(head_share=0.5).scores(scores, view(KINDS))
    assert torch.equal(steered[0, [0, 2]], scores[0, [0, 2]])
    torch.testing.assert_close(steered[0, [1, 3], 0, 2], torch.tensor([5.75, 5.75]))


def test_a_row_of_the_batch_without_an_image_keeps_its_scores() -> None:
    scores = torch.randn(1, 2, 1, 4)
    assert torch.equal(VAF().scores(scores, view([SYSTEM, SYSTEM, SYSTEM, GENERATED])), scores)


def test_positions_up_to_the_end_of_the_image_are_the_base_bitwise() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs(n_text=7)])
    is_image = family.expected_image_mask(batch)[0]
    end = int(is_image.nonzero()[-1]) + 1
    with torch.no_grad():
        base = family.model(**batch, output_hidden_states=True).hidden_states[2]
        with vlm_steer.steer(family.model, {"method": "vaf", "layers": [1, 2]}):
            steered = family.model(**batch, output_hidden_states=True).hidden_states[2]
    is_equal = (base == steered).all(dim=-1)[0]
    assert is_equal[:end].all()
    assert not is_equal[end:].any()


def test_the_fractions_of_the_default_are_the_authors_layers() -> None:
    class Depth:
        n_layers = 32

    (default,), (llava,) = resolve("vaf"), resolve("vaf_llava")
    assert default.select_layers(Depth()) == llava.select_layers(Depth()) == tuple(range(9, 15))


@pytest.mark.parametrize(
    ("option", "value"), [("alpha", -0.1), ("beta", 1.5), ("head_share", 0.0), ("head_share", 1.1)]
)
def test_a_number_outside_its_range_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        VAF(**{option: value})
