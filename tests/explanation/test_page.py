"""The page: what is in it, and that nothing in it can act."""

import base64
import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_steer.detection.trace import TraceLayout
from vlm_steer.engine.geometry import Places
from vlm_steer.engine.hooks import Columns
from vlm_steer.explanation.checks import Check
from vlm_steer.explanation.lens import Lens
from vlm_steer.explanation.payload import SCHEMA, payload
from vlm_steer.explanation.words import split_words

HEADS = ("the head most on the image", "the second such head", "the third such head")
HOSTILE = (
    "</script><script>document.title='owned'</script> <img src=x onerror=alert(1)> & \u2028 end"
)


def hostile(result):
    """The same explanation of an answer, to a question, full of markup."""
    arms = []
    for arm in result.arms:
        n = arm.trace.n_tokens
        edges = np.linspace(0, len(HOSTILE), n + 1).astype(int).tolist()
        spans = tuple(itertools.pairwise(edges))
        trace = replace(arm.trace, text=HOSTILE, spans=spans)
        words = split_words(trace)
        risk = {"logprob": (0.5,) * len(words)}
        place = tuple(float(i) for i in range(len(words)))
        lens = Lens(
            arm.lens.layers,
            arm.lens.logprob,
            arm.lens.best,
            dict.fromkeys(arm.lens.names, HOSTILE),
        )
        arm = replace(arm, name=HOSTILE, trace=trace, words=words, lens=lens, why_no_lens=HOSTILE)
        arms.append(replace(arm, risk=risk, position=place))
    provenance = {**result.provenance, "weights": HOSTILE, "detectors": {HOSTILE: HOSTILE}}
    return replace(result, arms=tuple(arms), prompt=HOSTILE, provenance=provenance)


def embedded(html):
    found = re.search(r'<script type="application/json" id="payload">(.*?)</script>', html, re.S)
    return json.loads(found.group(1))


def test_the_page_holds_what_to_json_gives(result):
    data = embedded(result.to_html())
    assert data == json.loads(result.to_json())
    assert data["schema"] == SCHEMA
    assert [arm["name"] for arm in data["arms"]] == ["none", "pai"]


def test_a_heat_map_can_be_computed_from_the_page_alone(result):
    data = embedded(result.to_html())
    maps = data["arms"][1]["maps"]
    values = np.frombuffer(base64.b64decode(maps["data"]), dtype=np.uint8)
    rows = values.reshape(maps["n_words"], len(maps["bands"]), len(data["places"][0]))
    weights = rows[4, 0] / 255 * maps["tops"][4 * len(maps["bands"])]
    heat = np.zeros((data["images"][0]["height"], data["images"][0]["width"]))
    for weight, box in zip(weights, data["places"][0], strict=True):
        if box is not None:
            left, top, right, bottom = (round(edge) for edge in box)
            heat[top:bottom, left:right] += weight / ((box[2] - box[0]) * (box[3] - box[1]))
    expected = result.heatmap(4)
    differs = np.abs(heat - expected) > 0.01 * expected.max()
    assert differs.mean() < 0.25  # the lines of pixels that two boxes share
    assert np.corrcoef(heat.ravel(), expected.ravel())[0, 1] > 0.95


def test_bands_of_layers_average_to_all_of_them(result):
    maps = payload(result)["arms"][0]["maps"]
    assert maps["bands"] == ["all layers", *(f"layer {i}" for i in range(6)), *HEADS]
    rows = np.frombuffer(base64.b64decode(maps["data"]), dtype=np.uint8).reshape(-1, 10, 64)
    tops = np.array(maps["tops"]).reshape(-1, 10, 1)
    values = rows / 255 * tops
    np.testing.assert_allclose(values[:, 1:7].mean(axis=1), values[:, 0], atol=tops.max() / 200)


def test_the_heads_most_on_the_image_have_maps_of_their_own(result):
    maps = payload(result)["arms"][1]["maps"]
    row = 2 * len(maps["bands"]) + 7
    values = np.frombuffer(base64.b64decode(maps["data"]), dtype=np.uint8).reshape(-1, 64)[row]
    layer, head = np.unravel_index(result.head_map(2).argmax(), (6, 6))
    tokens = result.words[2].tokens
    expected = result.arm.trace.maps[slice(*tokens), layer, head].float().mean(0)
    np.testing.assert_allclose(
        values / 255 * maps["tops"][row], expected, atol=maps["tops"][row] / 200
    )


def test_sinks_are_kept_beside_the_maps(result):
    trace = result.arm.trace
    sinks = torch.zeros_like(trace.sinks)
    sinks[:, trace.layout.image_columns[7]] = True
    arm = replace(result.arm, trace=replace(trace, sinks=sinks))
    maps = payload(replace(result, arms=(arm,)))["arms"][0]["maps"]
    rows = np.frombuffer(base64.b64decode(maps["data"]), dtype=np.uint8).reshape(-1, 10, 64)
    kept = np.frombuffer(base64.b64decode(maps["sink_values"]), dtype="<f4").reshape(-1, 10)
    assert maps["sinks"] == [7]
    assert not rows[..., 7].any()
    tokens = slice(*arm.words[0].tokens)
    np.testing.assert_allclose(
        kept[0, 0], trace.maps[tokens].float().mean(dim=(0, 1, 2))[7], rtol=1e-5
    )


def test_nothing_that_was_written_becomes_markup(result):
    html = hostile(result).to_html()
    assert html.count("<script") == 2
    assert html.count("</script") == 2
    assert "<img src=x" not in html
    assert embedded(html)["arms"][0]["text"] == HOSTILE


def test_the_page_reaches_for_nothing_outside_itself(result):
    html = result.to_html()
    assert not re.search(
        r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://|fetch\(""", html
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy.partition("script-src")[2]


def large(n_tokens, n_image, layers, heads):
    """An explanation of a long answer about many image tokens, with two arms."""
    generator = torch.Generator().manual_seed(0)
    kinds = [1, *[int(Columns.IMAGE)] * n_image, 3, 3]
    layout = TraceLayout(torch.tensor(kinds, dtype=torch.int8), ((1, 1 + n_image),), None, 1)
    text = " ".join(f"word{i:03d}" for i in range(n_tokens))
    spans = tuple((max(8 * i - 1, 0), 8 * i + 7) for i in range(n_tokens))

    def trace_of(trace):
        return replace(
            trace,
            text=text,
            ids=torch.zeros(n_tokens, dtype=torch.long),
            spans=spans,
            logprob=-torch.rand(n_tokens, generator=generator),
            layout=layout,
            layers=tuple(range(layers)),
            masses=torch.rand(n_tokens, layers, heads, 5, generator=generator),
            sinks=torch.zeros(layers, len(kinds), dtype=torch.bool),
            map_layers=tuple(range(layers)),
            maps=torch.rand(n_tokens, layers, 1, n_image, generator=generator).half(),
        )

    lens = Lens(
        tuple(range(layers)),
        -30 * torch.rand(n_tokens, layers, generator=generator),
        torch.randint(0, 9000, (n_tokens, layers), generator=generator),
        {token: f"<{token}>" for token in range(9000)},
    )
    return trace_of, lens


@pytest.mark.parametrize(
    ("n_image", "layers", "heads", "note"),
    [
        (576, 32, 32, "averaged over 4 bands of layers"),
        (2880, 2, 8, "averaged over all layers"),
        (64, 80, 64, "heads are shown for the first"),
    ],
)
def test_a_page_of_300_tokens_stays_below_5_megabytes(result, n_image, layers, heads, note):
    trace_of, lens = large(300, n_image, layers, heads)
    arms = []
    for arm in result.arms:
        trace = trace_of(arm.trace)
        words = split_words(trace)
        values = tuple(float(i) for i in range(len(words)))
        arm = replace(arm, trace=trace, words=words, lens=lens)
        arms.append(replace(arm, risk={"x": values}, position=values))
    boxes = torch.rand(n_image, 2).double() * 900
    picture = Image.effect_noise((1600, 1200), 90).convert("RGB")
    places = Places(torch.cat([boxes, boxes + 40], dim=1), (1600, 1200))
    page = replace(result, arms=tuple(arms), places=(places,), images=(picture,))
    assert len(page.to_html().encode()) < 5_000_000
    assert any(note in line for line in payload(page)["notes"])


def test_a_word_that_is_ruled_out_has_no_number(result):
    check = Check((1, 2), -0.5, -math.inf, -1.0, -math.inf)
    data = payload(replace(result, arms=(replace(result.arm, checks={1: check}),)))
    shown = data["arms"][0]["checks"]["1"]
    assert shown == {
        "cells": [1, 2],
        "logprob": -0.5,
        "without_cells": None,
        "without_others": -1.0,
        "without_image": None,
    }
    json.dumps(data, allow_nan=False)


def test_several_pictures_share_the_size_of_one(result):
    small, large = (Image.effect_noise((1600, 1200), 90).convert("RGB") for _ in range(2))
    both = replace(result, images=(small, large), places=result.places * 2)
    data = payload(both)
    assert len(data["images"]) == len(data["places"]) == 2
    one = payload(replace(both, images=(small,), places=result.places))
    together, alone = (
        sum(len(image["source"]) for image in seen["images"]) for seen in (data, one)
    )
    assert together < 1.2 * alone
    assert both.to_html().count('class="overlay"') == 2


def test_an_empty_answer_makes_a_page(result):
    trace = replace(result.arm.trace, text="", spans=((0, 0),) * result.arm.trace.n_tokens)
    arm = replace(result.arm, trace=trace, words=(), risk={"logprob": ()}, position=(), checks={})
    data = payload(replace(result, arms=(arm,)))
    assert data["arms"][0]["words"] == []
    assert data["arms"][0]["maps"]["n_words"] == 0


def test_a_notebook_shows_the_page_in_a_frame_without_rights(result):
    frame = result._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts"')
    assert frame.count("<") == 2
