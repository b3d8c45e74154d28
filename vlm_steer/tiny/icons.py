"""Silhouettes of the 24 categories: a body, and a darker detail on it.

The masks are computed with elementwise comparisons alone, so that bounding boxes and areas do not
depend on the rasteriser of an imaging library.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["BODY", "DETAIL", "EXTENT", "RESOLUTION", "icon"]

RESOLUTION = 64
"""Cells across a silhouette; the coordinates below run over [-1, 1], y downwards."""

EXTENT = 2.5
"""How far the empty margin of a mask reaches, so that a turned window never leaves the mask."""

BODY, DETAIL = 1, 16
"""Bits of a cell. They lie four apart, so that sums of up to 15 cells keep them separate."""

Mask = NDArray[np.bool_]
Shape = tuple[str, tuple[float, ...]]


def _box(left: float, top: float, right: float, bottom: float) -> Shape:
    return "box", (left, top, right, bottom)


def _oval(x: float, y: float, half_width: float, half_height: float) -> Shape:
    return "oval", (x, y, half_width, half_height)


def _ring(x: float, y: float, radius: float, thickness: float) -> Shape:
    return "ring", (x, y, radius, thickness)


def _dome(x: float, y: float, half_width: float, height: float) -> Shape:
    """Half an oval standing on ``y``; a negative height hangs below it."""
    return "dome", (x, y, half_width, height)


def _poly(*coordinates: float) -> Shape:
    """A convex polygon x0, y0, x1, y1, ..."""
    return "poly", coordinates


_DRAWINGS: dict[str, tuple[list[Shape], list[Shape]]] = {
    "fork": (
        [
            _box(-0.11, -0.1, 0.11, 0.95),
            _box(-0.45, -0.35, 0.45, -0.08),
            _box(-0.45, -0.95, -0.25, -0.3),
            _box(-0.1, -0.95, 0.1, -0.3),
            _box(0.25, -0.95, 0.45, -0.3),
        ],
        [_box(-0.11, 0.45, 0.11, 0.95)],
    ),
    "knife": (
        [_poly(-0.18, -0.95, 0.25, -0.55, 0.25, 0.2, -0.18, 0.2)],
        [_box(-0.18, 0.2, 0.16, 0.95)],
    ),
    "spoon": (
        [_oval(0, -0.52, 0.38, 0.43), _box(-0.1, -0.2, 0.1, 0.95)],
        [_oval(0, -0.52, 0.18, 0.24)],
    ),
    "cup": (
        [_box(-0.75, -0.55, 0.35, 0.75), _ring(0.4, 0.05, 0.45, 0.18)],
        [_box(-0.75, -0.55, 0.35, -0.3)],
    ),
    "bowl": ([_dome(0, -0.1, 0.9, -0.85)], [_box(-0.98, -0.3, 0.98, -0.08)]),
    "pizza": (
        [_poly(-0.85, -0.65, 0.85, -0.65, 0, 0.95)],
        [
            _box(-0.9, -0.9, 0.9, -0.62),
            _oval(-0.3, -0.3, 0.17, 0.17),
            _oval(0.32, -0.28, 0.17, 0.17),
            _oval(0, 0.2, 0.17, 0.17),
        ],
    ),
    "apple": (
        [_oval(-0.27, 0.2, 0.55, 0.68), _oval(0.27, 0.2, 0.55, 0.68)],
        [_box(-0.08, -0.9, 0.08, -0.3), _oval(0.38, -0.72, 0.32, 0.16)],
    ),
    "bottle": (
        [_box(-0.36, -0.15, 0.36, 0.95), _dome(0, -0.1, 0.36, 0.3), _box(-0.14, -0.8, 0.14, -0.1)],
        [_box(-0.2, -0.98, 0.2, -0.76), _box(-0.36, 0.2, 0.36, 0.6)],
    ),
    "person": (
        [
            _oval(0, -0.72, 0.24, 0.25),
            _poly(-0.42, -0.42, 0.42, -0.42, 0.28, 0.3, -0.28, 0.3),
            _box(-0.64, -0.4, -0.46, 0.2),
            _box(0.46, -0.4, 0.64, 0.2),
        ],
        [_box(-0.28, 0.25, -0.05, 0.97), _box(0.05, 0.25, 0.28, 0.97)],
    ),
    "car": (
        [_box(-0.97, -0.08, 0.97, 0.4), _poly(-0.6, -0.05, -0.35, -0.55, 0.35, -0.55, 0.65, -0.05)],
        [
            _oval(-0.52, 0.42, 0.25, 0.25),
            _oval(0.52, 0.42, 0.25, 0.25),
            _poly(-0.38, -0.1, -0.24, -0.42, 0.26, -0.42, 0.42, -0.1),
        ],
    ),
    "bus": (
        [_box(-0.95, -0.7, 0.95, 0.5)],
        [
            _box(-0.82, -0.5, -0.42, -0.1),
            _box(-0.3, -0.5, 0.1, -0.1),
            _box(0.22, -0.5, 0.62, -0.1),
            _oval(-0.5, 0.52, 0.22, 0.22),
            _oval(0.5, 0.52, 0.22, 0.22),
        ],
    ),
    "bicycle": (
        [_ring(-0.52, 0.3, 0.45, 0.14), _ring(0.52, 0.3, 0.45, 0.14)],
        [
            _poly(-0.55, 0.36, -0.1, -0.42, 0.04, -0.36, -0.42, 0.42),
            _poly(-0.18, -0.4, 0.36, -0.4, 0.36, -0.26, -0.18, -0.26),
            _poly(0.3, -0.65, 0.44, -0.65, 0.6, 0.3, 0.46, 0.3),
            _box(0.2, -0.75, 0.62, -0.6),
            _box(-0.32, -0.55, 0.05, -0.42),
        ],
    ),
    "traffic light": (
        [_box(-0.36, -0.97, 0.36, 0.55), _box(-0.09, 0.5, 0.09, 0.98)],
        [_oval(0, -0.68, 0.2, 0.2), _oval(0, -0.2, 0.2, 0.2), _oval(0, 0.28, 0.2, 0.2)],
    ),
    "dog": (
        [
            _oval(-0.1, 0.12, 0.62, 0.3),
            _oval(0.6, -0.3, 0.3, 0.28),
            _box(0.75, -0.32, 0.98, -0.1),
            _poly(-0.72, 0.05, -0.98, -0.5, -0.85, -0.55, -0.5, 0.0),
        ],
        [
            _box(-0.62, 0.25, -0.42, 0.85),
            _box(0.2, 0.25, 0.4, 0.85),
            _poly(0.35, -0.5, 0.5, -0.5, 0.48, 0.0, 0.3, -0.1),
        ],
    ),
    "laptop": (
        [_box(-0.72, -0.8, 0.72, 0.25), _poly(-0.72, 0.32, 0.72, 0.32, 0.98, 0.68, -0.98, 0.68)],
        [_box(-0.56, -0.64, 0.56, 0.1)],
    ),
    "mouse": (
        [_oval(0, 0.28, 0.5, 0.66)],
        [_box(-0.07, -0.97, 0.07, -0.3), _box(-0.5, 0.05, 0.5, 0.16), _oval(0, -0.12, 0.12, 0.2)],
    ),
    "keyboard": (
        [_box(-0.98, -0.42, 0.98, 0.42)],
        [
            *[_box(-0.86 + 0.36 * i, -0.3, -0.62 + 0.36 * i, -0.1) for i in range(5)],
            _box(-0.86, 0.08, -0.62, 0.28),
            _box(-0.5, 0.08, 0.46, 0.28),
            _box(0.58, 0.08, 0.82, 0.28),
        ],
    ),
    "book": (
        [
            _poly(-0.92, -0.62, 0, -0.42, 0, 0.68, -0.92, 0.48),
            _poly(0, -0.42, 0.92, -0.62, 0.92, 0.48, 0, 0.68),
        ],
        [
            _box(-0.06, -0.45, 0.06, 0.68),
            _box(-0.75, -0.25, -0.25, -0.13),
            _box(-0.75, 0.1, -0.25, 0.22),
            _box(0.25, -0.25, 0.75, -0.13),
            _box(0.25, 0.1, 0.75, 0.22),
        ],
    ),
    "clock": (
        [_oval(0, 0, 0.92, 0.92)],
        [_ring(0, 0, 0.92, 0.2), _box(-0.08, -0.55, 0.08, 0.06), _box(-0.08, -0.08, 0.45, 0.08)],
    ),
    "surfboard": ([_oval(0, 0, 0.3, 0.98)], [_box(-0.07, -0.8, 0.07, 0.62)]),
    "kite": (
        [_poly(0, -0.97, 0.65, -0.3, 0, 0.45, -0.65, -0.3)],
        [
            _box(-0.06, -0.9, 0.06, 0.97),
            _box(-0.6, -0.36, 0.6, -0.24),
            _box(-0.26, 0.58, 0.26, 0.72),
        ],
    ),
    "umbrella": (
        [_dome(0, 0.0, 0.97, 0.9)],
        [
            _box(-0.06, -0.95, 0.06, 0.85),
            _box(-0.34, 0.78, 0.06, 0.92),
            _box(-0.34, 0.6, -0.22, 0.9),
        ],
    ),
    "boat": (
        [
            _poly(-0.97, 0.3, 0.97, 0.3, 0.62, 0.85, -0.62, 0.85),
            _poly(0.08, -0.95, 0.75, 0.15, 0.08, 0.15),
        ],
        [_box(-0.08, -0.95, 0.08, 0.4), _poly(-0.1, -0.6, -0.1, 0.15, -0.6, 0.15)],
    ),
    "bird": (
        [
            _oval(0, 0.15, 0.52, 0.28),
            _oval(0.52, -0.15, 0.23, 0.22),
            _poly(-0.4, 0.05, -0.97, -0.1, -0.97, 0.25, -0.4, 0.3),
        ],
        [
            _poly(0.25, 0.15, -0.3, 0.15, -0.5, -0.75),
            _poly(0.7, -0.22, 0.98, -0.1, 0.7, -0.02),
        ],
    ),
}


@cache
def icon(category: str) -> NDArray[np.uint8]:
    """Return the silhouette of a category, margin included.

    Args:
        category: one of ``scenes.CATEGORIES``.

    Returns:
        ``[EXTENT * RESOLUTION, EXTENT * RESOLUTION]``; a cell holds ``BODY`` where there is
        anything and ``DETAIL`` as well where it is dark.
    """
    body, detail = (_union(shapes) for shapes in _DRAWINGS[category])
    cells = (body | detail) * np.uint8(BODY) + detail * np.uint8(DETAIL)
    margin = round((EXTENT - 1) * RESOLUTION / 2)
    padded = np.pad(cells, margin)
    padded.setflags(write=False)
    return padded


def _union(shapes: list[Shape]) -> Mask:
    mask = np.zeros((RESOLUTION, RESOLUTION), dtype=bool)
    for kind, numbers in shapes:
        mask |= _fill(kind, numbers)
    return mask


def _fill(kind: str, numbers: tuple[float, ...]) -> Mask:
    centres = (np.arange(RESOLUTION) * 2 + 1) / RESOLUTION - 1
    x, y = centres[None, :], centres[:, None]
    if kind == "box":
        left, top, right, bottom = numbers
        return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    if kind == "poly":
        return _fill_convex(numbers, x, y)
    if kind == "ring":
        centre_x, centre_y, radius, thickness = numbers
        distance = (x - centre_x) ** 2 + (y - centre_y) ** 2
        return (distance <= radius**2) & (distance >= (radius - thickness) ** 2)
    centre_x, centre_y, half_width, half_height = numbers
    inside = ((x - centre_x) / half_width) ** 2 + ((y - centre_y) / half_height) ** 2 <= 1
    if kind == "dome":
        inside &= (centre_y - y) * half_height >= 0
    return np.asarray(inside)


def _fill_convex(
    numbers: tuple[float, ...], x: NDArray[np.float64], y: NDArray[np.float64]
) -> Mask:
    corners = list(zip(numbers[::2], numbers[1::2], strict=True))
    sides = [
        (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True)
    ]
    crossings = np.stack(sides)
    return np.asarray((crossings >= 0).all(0) | (crossings <= 0).all(0))
