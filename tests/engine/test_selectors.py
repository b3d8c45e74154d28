"""Selectors of layers and heads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_steer.engine.selectors import check_selector, select
from vlm_steer.errors import ConfigError


@pytest.mark.parametrize(
    ("selector", "size", "expected"),
    [
        ("all", 4, (0, 1, 2, 3)),
        ((9, 14), 32, (9, 10, 11, 12, 13)),
        ((2, None), 5, (2, 3, 4)),
        ((0.0625, None), 32, tuple(range(2, 32))),
        ((0.25, 0.5), 8, (2, 3)),
        ({"indices": [18, 1]}, 32, (1, 18)),
        ({"last": 14}, 32, tuple(range(18, 32))),
        ({"last": 0.4375}, 32, tuple(range(18, 32))),
        ({"last": 0.4375}, 6, (3, 4, 5)),
        ({"union": [{"indices": [1]}, {"last": 2}]}, 6, (1, 4, 5)),
    ],
)
def test_a_selector_means_what_the_table_says(
    selector: object, size: int, expected: tuple[int, ...]
) -> None:
    assert select(selector, size) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "selector", [(2, 9), (4, 4), {"indices": [0, 8]}, {"indices": []}, {"last": 9}, (5, 3)]
)
def test_a_selector_that_misses_even_partly_is_an_error_with_the_size(selector: object) -> None:
    with pytest.raises(ConfigError, match="8 layers"):
        select(selector, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "selector",
    [
        "some",
        (1, 2, 3),
        (None, 2),
        {"first": 2},
        {"last": 0},
        {"indices": 3},
        {"union": []},
        {"last": 2, "indices": [1]},
        {"indices": [True]},
        3,
    ],
)
def test_what_is_no_selector_is_an_error(selector: object) -> None:
    with pytest.raises(ConfigError, match="is not a selector"):
        check_selector(selector)  # type: ignore[arg-type]


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_fractions_never_leave_the_model(size: int, start: float, stop: float) -> None:
    try:
        chosen = select((start, stop), size)
    except ConfigError:
        assert round(start * size) >= round(stop * size)
    else:
        assert chosen == tuple(range(round(start * size), round(stop * size)))
