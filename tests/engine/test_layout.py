"""Token layout, against the zoo's independent truth and by hand."""

import pytest
import torch

from tests.families import zoo
from vlm_steer.engine.hooks import Columns
from vlm_steer.engine.layout import Layout
from vlm_steer.engine.model import inspect_model

P, S, I, Q, G = range(5)  # noqa: E741


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_image_columns_are_the_image_tokens_of_every_family(name: str) -> None:
    family = zoo.load(name)
    batch = family.batch([family.inputs(n_text=4), family.inputs(n_text=8, seed=1)])
    info = inspect_model(family.model)
    layout = Layout.from_ids(batch["input_ids"], batch["attention_mask"], info.image_token_ids)
    columns = Columns(layout.prompt)
    if not info.has_cross_attention:
        assert torch.equal(columns.is_image, family.expected_image_mask(batch))
    assert torch.equal(columns.is_padding, batch["attention_mask"] == 0)
    assert layout.has_image


def test_text_around_two_images_is_system_then_instruction() -> None:
    ids = torch.tensor([[0, 1, 20, 3, 3, 21, 3, 22], [1, 20, 21, 22, 23, 24, 25, 26]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8])
    layout = Layout.from_ids(ids, mask, (3,))
    assert layout.prompt.tolist() == [[P, S, S, I, I, Q, I, Q], [S] * 8]
    assert layout.first_after_image == 5


def test_positions_after_the_prompt_are_generated_and_grow_without_end() -> None:
    layout = Layout.from_ids(torch.tensor([[1, 3, 20]]), None, (3,))
    assert layout.upto(5).tolist() == [[S, I, Q, G, G]]
    assert layout.upto(1000).shape == (1, 1000)
    assert bool((layout.upto(1000)[:, 3:] == G).all())


def test_a_window_holds_the_last_columns_and_a_static_cache_empty_ones() -> None:
    layout = Layout.from_ids(torch.tensor([[1, 3, 20]]), None, (3,))
    assert layout.keys(2, 4).tolist() == [[Q, G]]
    assert layout.keys(6, 4).tolist() == [[S, I, Q, G, P, P]]


def test_the_end_of_the_prompt_is_found_behind_padding_and_generated_tokens() -> None:
    columns = Columns(torch.tensor([[P, S, I, Q, Q, G, G, P], [S, I, I, Q, Q, G, G, P]]))
    expected = [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert columns.is_prompt_end(2).int().tolist() == expected
