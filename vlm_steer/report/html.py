"""A report as one HTML file that needs nothing else: no network, no scripts, no other files.

Everything that a model or a user wrote is escaped by the template; the only markup that passes
through is the SVG that this package draws.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import jinja2
from PIL import Image

from vlm_steer import __version__

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = [
    "Block",
    "Chart",
    "Gallery",
    "MarkedText",
    "Paragraphs",
    "Report",
    "Sample",
    "Span",
    "Table",
    "render_html",
    "thumbnail",
]

Kind = Literal["wrong", "right"]


@dataclass(frozen=True)
class Span:
    """A half-open character range of a text, and what is to be said about it.

    Attributes:
        start: first character.
        end: one past the last character.
        kind: `wrong` (hallucinated) or `right`.
        note: shown when pointed at.
    """

    start: int
    end: int
    kind: Kind
    note: str = ""


@dataclass(frozen=True)
class MarkedText:
    """What one arm answered, with marked words; spans must not overlap.

    Attributes:
        label: the arm.
        text: the answer.
        spans: marks, in any order.
        note: said behind the label, such as "2 hallucinated".
    """

    label: str
    text: str
    spans: tuple[Span, ...] = ()
    note: str = ""

    @property
    def pieces(self) -> list[tuple[str, Span | None]]:
        """The text cut at the marks."""
        pieces: list[tuple[str, Span | None]] = []
        position = 0
        for span in sorted(self.spans, key=lambda span: span.start):
            if span.start > position:
                pieces.append((self.text[position : span.start], None))
            pieces.append((self.text[max(span.start, position) : span.end], span))
            position = max(position, span.end)
        pieces.append((self.text[position:], None))
        return [(text, span) for text, span in pieces if text]


@dataclass(frozen=True)
class Sample:
    """One image with what was asked and answered.

    Attributes:
        image: a data URI from `thumbnail`; empty for none.
        title: what the image is called.
        prompt: what was asked.
        truth: what is right.
        answers: one per arm.
    """

    image: str
    title: str
    prompt: str
    truth: str
    answers: tuple[MarkedText, ...]


@dataclass(frozen=True)
class Table:
    """Text cells under column names; numbers come formatted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    template: str = "table"


@dataclass(frozen=True)
class Chart:
    """An SVG element drawn by `vlm_steer.report.plots`."""

    title: str
    svg: str
    note: str = ""
    template: str = "chart"

    @property
    def markup(self) -> "Markup":
        """The SVG, not to be escaped."""
        from markupsafe import Markup

        return Markup(self.svg)


@dataclass(frozen=True)
class Gallery:
    """Samples under a title."""

    title: str
    samples: Sequence[Sample]
    note: str = ""
    template: str = "gallery"


@dataclass(frozen=True)
class Paragraphs:
    """Lines of text under a title."""

    title: str
    lines: Sequence[str]
    template: str = "paragraphs"


Block = Table | Chart | Gallery | Paragraphs


@dataclass(frozen=True)
class Report:
    """A page: a title, a sentence under it, and blocks."""

    title: str
    subtitle: str
    blocks: Sequence[Block]


def thumbnail(image: Image.Image, *, side: int = 192) -> str:
    """An image as a data URI, scaled down to at most `side` pixels, never up."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def render_html(report: Report) -> str:
    """The report as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm_steer.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(report=report, version=__version__)
