"""Segments without order."""

import pytest
import torch

from vlm_steer.functional import (
    aligned_positions,
    image_segments,
    see_other_segments,
    segment_importance,
    segment_lengths,
    segment_shifts,
)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (None, "...000011112222.."),
        (0, ".000011112222...."),
        (1, "..000011112222..."),
        (2, "...000011112222.."),
        (9, "...000011112222.."),
    ],
)
def test_text_between_images_is_shared_out(tail: int | None, expected: str) -> None:
    image = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]]).bool()
    segments = image_segments(image, torch.ones_like(image), tail=tail)
    assert "".join("." if s < 0 else str(s) for s in segments[0].tolist()) == expected


def test_padding_and_the_last_token_are_in_no_segment() -> None:
    image = torch.tensor([[0, 0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0, 0]]).bool()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    segments = image_segments(image, mask)
    assert segments.tolist() == [[-1, -1, 0, 0, 1, 1, -1], [-1, 0, 0, 0, 1, 1, -1]]


def test_one_image_or_none_is_no_segment() -> None:
    image = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert (image_segments(image, torch.ones_like(image)) == -1).all()


def test_segments_end_together_and_the_suffix_stays() -> None:
    segments = torch.tensor([[-1, -1, 0, 0, 0, 1, 2, 2, -1, -1]])
    positions = torch.arange(10)[None]
    assert aligned_positions(positions, segments, 3).tolist() == [[0, 1, 5, 6, 7, 7, 6, 7, 8, 9]]
    assert segment_lengths(segments, 3).tolist() == [[3, 1, 2]]


def test_the_most_important_segment_stays_nearest() -> None:
    lengths = torch.tensor([[3, 1, 2]])
    importance = torch.tensor([0.2, 0.7, 0.1])[None, None, None]
    assert segment_shifts(importance, lengths).tolist() == [[[[1, 0, 4]]]]
    ties = torch.zeros(1, 1, 1, 3)
    assert segment_shifts(ties, lengths).tolist() == [[[[0, 3, 4]]]]


def test_importance_is_the_mean_weight_among_segments() -> None:
    segments = torch.tensor([[-1, 0, 0, 1, -1, 2]])
    scores = torch.randn(1, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([[-1, 1, 2]])
    seen = segment_importance(scores, segments, 3, own=own)
    weights = scores[0, :, 0, [1, 2, 3, 5]].softmax(-1)
    expected = torch.stack([weights[:, :2].mean(-1), weights[:, 2], weights[:, 3]], dim=-1)
    torch.testing.assert_close(seen[0, :, 0], expected)
    left = scores[0, :, 1, [1, 2, 5]].softmax(-1)
    torch.testing.assert_close(seen[0, :, 1, 0], left[:, :2].mean(-1))
    assert (seen[0, :, 1, 1] == 0).all()
    assert (segment_importance(scores, torch.full_like(segments, -1), 3) == 0).all()


def test_rows_see_other_segments_and_stay_causal_in_their_own() -> None:
    segments = torch.tensor([[-1, 0, 0, 1, 1, -1]])
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    allowed = see_other_segments(causal, segments, segments)[0].int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
