"""Fields of view and their contrasts, held to plain loops."""

import pytest
import torch
from torch import Tensor, nn

from vlm_steer import functional as F

_KL = nn.functional.kl_div


def contrasts_by_hand(fields: list[Tensor], candidates: int, weight: float) -> Tensor:
    """As the official code does it: one text, field by field, with its swapped divergence."""
    pairs = []
    for a in range(len(fields)):
        for b in range(a + 1, len(fields)):
            middle = (fields[a].softmax(-1) + fields[b].softmax(-1)) / 2
            one, two = (
                _KL(fields[i][None].log_softmax(-1), middle[None], reduction="batchmean")
                for i in (a, b)
            )
            pairs.append((float(one + two) / 2, a, b))
    found = []
    for _, a, b in sorted(pairs, reverse=True)[: candidates // 2]:
        found += [fields[b] - weight * fields[a], fields[a] - weight * fields[b]]
    return torch.stack(found)


@pytest.mark.parametrize(("count", "candidates"), [(2, 2), (4, 4), (4, 12), (5, 6)])
def test_contrasts_are_those_of_the_pairs_that_differ_most_both_ways(count, candidates) -> None:
    logits = torch.randn(3, count, 40) * 3
    found = F.focal_contrasts(logits, candidates=candidates, weight=0.05, divergence="kl_m")
    for row, fields in zip(found, logits, strict=True):
        torch.testing.assert_close(row, contrasts_by_hand(list(fields), candidates, 0.05))


def test_the_papers_divergence_can_choose_another_pair() -> None:
    torch.manual_seed(1)
    logits = torch.randn(50, 4, 8) * 4
    paper, code = (
        F.focal_contrasts(logits, candidates=2, weight=0.5, divergence=kind)
        for kind in ("jsd", "kl_m")
    )
    is_same = (paper == code).all(dim=-1).all(dim=-1)
    assert is_same.any()
    assert not is_same.all()


def test_a_token_that_a_field_excludes_gives_no_infinity_in_the_others() -> None:
    logits = torch.randn(1, 3, 10)
    logits[0, 1, 4] = -torch.inf
    found = F.focal_contrasts(logits, candidates=6, weight=0.5)
    assert not found.isnan().any()
    assert not (found == torch.inf).any()


def test_fields_shrink_once_and_then_grow_until_the_border() -> None:
    box = torch.tensor([[0.4, 0.1, 0.6, 0.3]])
    (fields,) = F.fields_of_view(box, count=4, growth=0.6)
    expected = [[0.46, 0.16, 0.54, 0.24], [0.4, 0.1, 0.6, 0.3], [0.34, 0.04, 0.66, 0.36]]
    torch.testing.assert_close(fields[:3], torch.tensor(expected))
    torch.testing.assert_close(fields[3], torch.tensor([0.244, 0.0, 0.756, 0.456]))


def test_no_growth_turns_a_field_inside_out() -> None:
    (fields,) = F.fields_of_view(torch.tensor([[0.2, 0.2, 0.8, 0.8]]), count=3, growth=5.0)
    assert (fields[:, 2:] > fields[:, :2]).all()


def grid(side: int, images: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Number, place and size of the tokens of square images, ``[1, tokens]`` each."""
    image = torch.arange(images).repeat_interleave(side * side)
    place = (torch.arange(side) + 0.5) / side
    across, down = place.repeat(side).repeat(images), place.repeat_interleave(side).repeat(images)
    cell = torch.full((1, images * side * side, 2), 1 / side)
    return image[None], across[None], down[None], cell


def test_a_box_that_is_attended_evenly_comes_out_as_itself() -> None:
    image, across, down, cell = grid(40)
    is_in = (across > 0.2) & (across < 0.5) & (down > 0.6) & (down < 0.9)
    found = F.attended_box(is_in.float(), image, across, down, cell)
    torch.testing.assert_close(found.box, torch.tensor([[0.2, 0.6, 0.5, 0.9]]), atol=0.01, rtol=0)


def test_the_image_with_the_most_attention_is_looked_at_and_text_is_not() -> None:
    image, across, down, cell = grid(4, images=2)
    attention = torch.full_like(across, 0.01)
    attention[0, 16 + 5] = 1.0
    image[0, 3] = -1
    attention[0, 3] = 9.0
    found = F.attended_box(attention, image, across, down, cell)
    assert found.image.tolist() == [1]
    torch.testing.assert_close(found.box, torch.tensor([[0.25, 0.25, 0.5, 0.5]]))


def test_attention_without_a_peak_is_the_whole_image() -> None:
    image, across, down, cell = grid(10)
    found = F.attended_box(torch.ones_like(across), image, across, down, cell)
    torch.testing.assert_close(found.box, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), atol=0.01, rtol=0)
