"""Reports that stand alone and cannot be broken by what they show."""

import re

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_steer.report import (
    Chart,
    Estimate,
    Gallery,
    MarkedText,
    Paragraphs,
    Point,
    Report,
    Sample,
    Span,
    Step,
    Table,
    frontier_chart,
    interval_chart,
    render_html,
    thumbnail,
)

NASTY = "<script>alert('$x_1$')</script> & \"quotes\""


def _page(*blocks):
    return render_html(Report(NASTY, NASTY, blocks))


def test_everything_shown_is_escaped():
    sample = Sample(
        thumbnail(Image.new("RGB", (8, 8))),
        NASTY,
        NASTY,
        NASTY,
        (MarkedText(NASTY, NASTY, (Span(0, 8, "wrong", NASTY),), NASTY),),
    )
    html = _page(
        Table(NASTY, [NASTY], [[NASTY]]),
        Gallery(NASTY, [sample], NASTY),
        Paragraphs(NASTY, [NASTY]),
        Chart(NASTY, interval_chart({NASTY: [Estimate(NASTY, 1, 0, 2)]}), NASTY),
        Chart(
            NASTY,
            frontier_chart(
                (NASTY, NASTY),
                [Step(1, 2, 1, 3)],
                [Point(NASTY, 1, 2)],
                [Point(NASTY, 2, 1, "good")],
            ),
        ),
    )
    assert "<script" not in html
    assert html.count("<svg") == 2


def test_a_page_needs_no_network_and_no_script():
    html = _page(
        Chart("c", interval_chart({"a": [Estimate("x", 1, 0, 2)]}, reference=0)),
        Gallery("g", [Sample(thumbnail(Image.new("L", (300, 20))), "i", "p", "t", ())]),
    )
    assert "http" not in html.replace("http-equiv", "")
    assert not re.search(r"<(script|link|iframe|object)\b|\bsrc=\"(?!data:)|url\((?!#)", html)
    assert "default-src 'none'" in html


@given(st.text(max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_pieces_of_a_marked_text_make_up_the_text(text, cuts):
    edges = sorted({min(cut, len(text)) for cut in cuts})
    spans = tuple(
        Span(a, b, "right") for a, b in zip(edges[::2], edges[1::2], strict=False) if a < b
    )
    pieces = MarkedText("arm", text, spans).pieces
    assert "".join(piece for piece, _ in pieces) == text
    assert [span for _, span in pieces if span] == list(spans)


def test_thumbnails_shrink_and_never_grow():
    assert len(thumbnail(Image.new("RGB", (2000, 1000)))) < 2000
    import base64
    import io

    for size, expected in (((2000, 1000), (192, 96)), ((50, 20), (50, 20))):
        encoded = thumbnail(Image.new("RGBA", size)).partition(",")[2]
        assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == expected


def test_equal_charts_are_equal_bytes_and_gaps_are_allowed():
    nan = float("nan")
    panels = {"a": [Estimate("x", nan, nan, nan), Estimate("y", 1, 0, 2, "good")]}
    assert interval_chart(panels) == interval_chart(panels)
