"""Charts as inline SVG."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Estimate", "Point", "Step", "frontier_chart", "interval_chart"]

_ADDRESSES = re.compile(r"<metadata>.*?</metadata>|\sxmlns(?::\w+)?=\"[^\"]*\"", re.DOTALL)
_SETTINGS: Any = {
    "svg.hashsalt": "vlm_steer",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
}
_COLOURS = {"plain": "#33506b", "good": "#1b7f4b", "bad": "#b3372f"}


class Estimate(NamedTuple):
    """A value with its interval; `tone` is `plain`, `good` or `bad`."""

    label: str
    value: float
    low: float
    high: float
    tone: str = "plain"


class Point(NamedTuple):
    """A named point of a plane; `tone` is `plain`, `good` or `bad`."""

    label: str
    x: float
    y: float
    tone: str = "plain"


class Step(NamedTuple):
    """A staircase at one abscissa, with its band."""

    x: float
    y: float
    low: float
    high: float


def frontier_chart(
    axes: tuple[str, str],
    steps: Sequence[Step],
    baselines: Sequence[Point],
    methods: Sequence[Point],
) -> str:
    """A staircase with its band, the baselines that make it, and the methods held against it.

    Args:
        axes: what is drawn to the right and upwards.
        steps: the staircase, from left to right; its value holds back to the step before.
        baselines: small points; only their places are shown.
        methods: large points with their labels.

    Returns:
        An SVG element. Labels are drawn as plain text, whatever characters they hold.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(6.4, 4.2))
        axis = figure.subplots()
        x = [step.x for step in steps]
        axis.fill_between(
            x,
            [step.low for step in steps],
            [step.high for step in steps],
            step="pre",
            color="#d7dee6",
            linewidth=0,
        )
        axis.plot(x, [step.y for step in steps], drawstyle="steps-pre", color="#8a98a6")
        axis.plot(
            [point.x for point in baselines], [point.y for point in baselines], ".", color="#8a98a6"
        )
        for point in methods:
            colour = _COLOURS[point.tone]
            axis.plot([point.x], [point.y], "o", color=colour, markersize=6)
            axis.annotate(
                point.label,
                (point.x, point.y),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
        axis.set_xlabel(axes[0], fontsize=9)
        axis.set_ylabel(axes[1], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        return _svg(figure)


def interval_chart(
    panels: Mapping[str, Sequence[Estimate]], *, reference: float | None = None
) -> str:
    """Panels of points with their intervals, side by side, one row per label.

    Args:
        panels: panel title -> estimates; every panel has the same labels in the same order.
        reference: where to draw a vertical line, such as 0 for differences.

    Returns:
        An SVG element. Labels are drawn as plain text, whatever characters they hold.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [estimate.label for estimate in next(iter(panels.values()))]
    with matplotlib.rc_context(_SETTINGS):
        margin = 0.25 + 0.075 * max(map(len, rows))
        width, height = margin + 2.6 * len(panels), 0.7 + 0.34 * len(rows)
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(
            left=margin / width, right=1 - 0.1 / width, bottom=0.3 / height, top=1 - 0.3 / height
        )
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, estimates) in zip(axes, panels.items(), strict=True):
            for row, estimate in enumerate(estimates):
                colour = _COLOURS[estimate.tone]
                axis.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=2)
                axis.plot([estimate.value], [row], "o", color=colour, markersize=5)
            if reference is not None:
                axis.axvline(reference, color="#999999", linewidth=1, linestyle="--")
            axis.set_title(title, fontsize=9)
            axis.set_yticks(range(len(rows)), rows, fontsize=8)
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.tick_params(axis="x", labelsize=8)
            axis.grid(axis="x", color="#e4e4e4", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right", "left"]].set_visible(False)
        return _svg(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    # Inside HTML the namespaces are implied; without them and the metadata no address remains.
    return _ADDRESSES.sub("", svg[svg.index("<svg") :])
