"""The page in a real browser: Chromium, driven by Playwright, where both are installed."""

import math
import os
import shutil
from dataclasses import replace

import pytest
import torch

from tests.explanation.test_page import hostile
from vlm_steer.engine.geometry import Places
from vlm_steer.explanation import Check

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs Playwright (pip install playwright) and Chromium"
)
BRIGHTEST = """() => {
  const c = document.getElementById("overlay-0");
  const p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  const bright = (i) => p[4 * i + 1] * p[4 * i + 3];
  let best = 0;
  for (let i = 0; i < c.width * c.height; i++) if (bright(i) > bright(best)) best = i;
  return [(best % c.width + 0.5) / c.width, (Math.floor(best / c.width) + 0.5) / c.height];
}"""
OVERLAY = "() => document.getElementById('overlay-0').toDataURL()"


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        try:
            launched = playwright.chromium.launch(executable_path=found, args=flags)
        except sync_api.Error as error:
            pytest.skip(f"Chromium does not start here: {error}")
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, result, tmp_path):
    """Opens an explanation; fails on errors of the script and on requests."""
    wrong = []
    pages = []

    def opened(explanation=result, **context):
        explanation.to_html(tmp_path / "out.html")
        page = browser.new_page(**context)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        address = (tmp_path / "out.html").as_uri()
        page.on("request", lambda r: r.url.startswith(("data:", address)) or wrong.append(r.url))
        page.goto(address)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert wrong == []


def word(page, number, arm=1):
    return page.locator(f".word[data-arm='{arm}'][data-word='{number}']")


def test_pointing_at_a_word_changes_the_overlay(opened, result):
    page = opened()
    empty = page.evaluate(OVERLAY)
    word(page, 2).hover()
    one = page.evaluate(OVERLAY)
    word(page, 5).hover()
    other = page.evaluate(OVERLAY)
    assert len({empty, one, other}) == 3
    assert page.locator("#overlay-0").get_attribute("data-word") == "1:5"
    assert result.words[5].text in page.locator("#overlay-0").get_attribute("aria-label")
    assert result.words[5].text in page.locator("#word-name").inner_text()


def test_the_overlay_is_brightest_where_the_heat_map_is(opened, result):
    page = opened()
    word(page, 3).hover()
    page.locator("#opacity").fill("1")
    brightest = page.evaluate(BRIGHTEST)
    heat = result.heatmap(3)
    x, y = int(brightest[0] * heat.shape[1]), int(brightest[1] * heat.shape[0])
    assert heat[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].max() == pytest.approx(
        heat.max(), rel=0.05
    )


@pytest.mark.parametrize("beyond", ["mean", "position"])
def test_attention_beyond_what_is_expected_is_that_of_the_heat_map(opened, result, beyond):
    page = opened()
    page.locator("#opacity").fill("1")
    page.locator("#mode").select_option(beyond)
    word(page, 9).hover()
    x, y = page.evaluate(BRIGHTEST)
    heat = result.heatmap(9, beyond=beyond)
    column, row = int(x * heat.shape[1]), int(y * heat.shape[0])
    near = heat[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
    assert near.max() == pytest.approx(heat.max(), rel=0.05)


def test_the_layers_at_which_a_word_becomes_likely_are_shown(opened, result):
    page = opened()
    word(page, 5).hover()
    cells = page.locator("#lens tr").nth(1).locator("td").all_inner_texts()
    shown = [float(cell.removesuffix(" %")) for cell in cells]
    assert shown == pytest.approx((100 * result.lens(5)).tolist(), abs=0.1)
    assert result.words[5].text in page.locator("#lens-caption").inner_text()
    page.locator(".scroll").focus()
    assert page.evaluate("() => document.activeElement.className") == "scroll"


def test_a_locked_word_stays_and_escape_lets_it_go(opened):
    page = opened()
    word(page, 4).click()
    word(page, 6).hover()
    assert page.locator("#overlay-0").get_attribute("data-word") == "1:4"
    assert word(page, 4).get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    word(page, 7).hover()
    assert page.locator("#overlay-0").get_attribute("data-word") == "1:7"


def test_arrows_move_between_words_and_answers(opened):
    page = opened()
    word(page, 0).focus()
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "End", "Home"):
        page.keyboard.press(key)
        seen.append(page.locator("#overlay-0").get_attribute("data-word"))
    last = page.locator(".word[data-arm='0']").count() - 1
    assert seen == ["1:1", "1:2", "1:1", "0:1", f"0:{last}", "0:0"]
    assert page.locator(".word[tabindex='0']").count() == 1


def test_the_threshold_decides_what_is_coloured(opened, result):
    page = opened()
    slider = page.locator("#threshold")
    counts = []
    for edge in ("min", "max"):
        slider.evaluate(
            "(s, edge) => { s.value = s[edge]; s.dispatchEvent(new Event('input')); }", edge
        )
        counts.append(page.locator(".word[data-arm='1'].flagged").count())
    assert counts[0] == len(result.words) > counts[1]
    page.locator("#detector").select_option("svar")
    assert "svar" in word(page, 0).get_attribute("title")
    assert "words before it" in word(page, 0).get_attribute("title")


def test_checks_layers_colours_and_modes_are_shown(opened, result):
    page = opened()
    number = next(iter(result.arm.checks))
    word(page, number).hover()
    assert "others at random" in page.locator("#word-facts").inner_text()
    seen = {page.evaluate(OVERLAY)}
    for control, choice in (("band", "2"), ("mode", "mean"), ("palette", "cividis")):
        page.locator(f"#{control}").select_option(choice)
        seen.add(page.evaluate(OVERLAY))
    assert len(seen) == 4
    assert "strongest: layer" in page.locator("#heads").get_attribute("aria-label")


def test_a_click_on_the_picture_marks_the_words_that_looked_there(opened):
    page = opened()
    page.locator("#overlay-0").click(position={"x": 60, "y": 60})
    assert 0 < page.locator(".word.looks").count() <= 12


def test_a_word_that_is_ruled_out_is_called_that(opened, result):
    check = Check((1, 2), -0.5, -math.inf, -1.0, -math.inf)
    page = opened(replace(result, arms=(result.arms[0], replace(result.arm, checks={3: check}))))
    word(page, 3).hover()
    facts = page.locator("#word-facts").inner_text()
    assert "looked at most ruled out" in facts
    assert "without it the word is ruled out" in facts
    assert "Infinity" not in facts


def test_every_picture_has_an_overlay_on_one_scale(opened, result):
    places = result.places[0]
    half = places.boxes[:, 0] < 50
    both = tuple(
        Places(places.boxes.where(mine[:, None], torch.nan), places.size) for mine in (half, ~half)
    )
    page = opened(replace(result, images=result.images * 2, places=both))
    word(page, 3).hover()
    pictures = [page.evaluate(OVERLAY.replace("overlay-0", f"overlay-{k}")) for k in range(2)]
    assert pictures[0] != pictures[1]
    assert "in picture 2 for the word" in page.locator("#overlay-1").get_attribute("aria-label")
    second = page.locator("#overlay-1")
    size = second.bounding_box()
    second.click(position={"x": 0.7 * size["width"], "y": 0.5 * size["height"]})
    assert page.locator(".word.looks").count() > 0


def test_arrow_keys_reach_what_a_pointer_reaches(opened, result):
    page = opened()
    word(page, 4).click()
    page.locator("#overlay-0").focus()
    for key in ("ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    assert page.locator("#lookers").inner_text().startswith("Looked there most: ")
    assert page.locator(".word.looks").count() > 0
    page.keyboard.press("Escape")
    assert page.locator(".word.looks").count() == 0
    page.locator("#heads").focus()
    for key in ("ArrowRight", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    mass = result.head_map(4)[2, 0]
    told = page.locator("#head-cell").inner_text()
    assert told.startswith("layer 2, head 0: ")
    assert float(told.split()[-5]) == pytest.approx(100 * mass, abs=0.5)


def test_everything_that_acts_can_be_reached_by_tab(opened):
    page = opened()
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("() => document.activeElement.id || document.activeElement.className")
        )
    controls = {"band", "mode", "palette", "opacity", "detector", "threshold"}
    assert controls | {"overlay-0", "heads", "scroll"} <= reached
    assert any(name.startswith("word") for name in reached)


def test_dark_mode_is_dark(opened):
    page = opened(color_scheme="dark")
    red = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
    assert int(red) < 60


def test_markup_in_an_answer_is_shown_and_does_not_act(opened, result):
    page = opened(hostile(result))
    assert "owned" not in page.title().partition("Explanation")[0]
    assert page.title().startswith("Explanation: </script><script>")
    assert page.locator("img").count() == 1
    assert "<img src=x onerror=alert(1)>" in page.locator(".answer").first.inner_text()
