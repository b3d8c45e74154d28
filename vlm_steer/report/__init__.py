"""Self-contained HTML reports: tables, interval charts, and pictures with marked answers."""

from vlm_steer.report.html import (
    Block,
    Chart,
    Gallery,
    MarkedText,
    Paragraphs,
    Report,
    Sample,
    Span,
    Table,
    render_html,
    thumbnail,
)
from vlm_steer.report.plots import Estimate, Point, Step, frontier_chart, interval_chart

__all__ = [
    "Block",
    "Chart",
    "Estimate",
    "Gallery",
    "MarkedText",
    "Paragraphs",
    "Point",
    "Report",
    "Sample",
    "Span",
    "Step",
    "Table",
    "frontier_chart",
    "interval_chart",
    "render_html",
    "thumbnail",
]
