"""Charts as inline SVG."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Estimate", "interval_chart"]

_ADDRESSES = re.compile(r"<metadata>.*?</metadata>|\sxmlns(?::\w+)?=\"[^\"]*\"", re.DOTALL)
_COLOURS = {"plain": "#33506b", "good": "#1b7f4b", "bad": "#b3372f"}


class Estimate(NamedTuple):
    """A value with its interval; `tone` is `plain`, `good` or `bad`."""

    label: str
    value: float
    low: float
    high: float
    tone: str = "plain"


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
    settings: Any = {
        "svg.hashsalt": "vlm_steer",
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(settings):
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
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    # Inside HTML the namespaces are implied; without them and the metadata no address remains.
    return _ADDRESSES.sub("", svg[svg.index("<svg") :])
