"""The command that takes an answer apart."""

import json

import pytest


@pytest.fixture
def ask(run, pictures):
    """``vlm-steer explain`` about the first picture, with more options."""

    def ask(*more, image=None):
        fixed = ("-p", "Is there a cat?", "--model", "tiny", "--max-new-tokens", 4)
        return run("explain", image or pictures[0], *fixed, *more)

    return ask


def test_the_page_and_the_json_are_written_where_asked(ask, tmp_path):
    html, folder = tmp_path / "new" / "out.html", tmp_path / "run"
    more = ("--method", "pai", "--checks", 1, "--detector", "svar", "--detector", "entropy")
    code, out, err = ask(*more, "--html", html, "--output", folder)
    assert code == 0
    assert "without its cells" in out
    assert str(html) in out
    assert "embedded model" in err
    data = json.loads((folder / "explain.json").read_text())
    assert list(data["arms"][0]["risk"]) == ["svar", "entropy"]
    assert [arm["name"] for arm in data["arms"]] == ["none", "pai"]
    assert data["provenance"]["weights"] == "tiny"
    assert data["provenance"]["files"] == ["red.png"]
    assert html.read_text().startswith("<!doctype html>")


def test_several_pictures_are_asked_about_at_once(ask, pictures, tmp_path):
    code, _, _ = ask(pictures[1], "--checks", 0, "--output", tmp_path)
    data = json.loads((tmp_path / "explain.json").read_text())
    assert code == 0
    assert len(data["images"]) == 2
    assert data["provenance"]["files"] == ["red.png", "blue.jpg"]


def test_json_is_printed_for_programs(ask):
    code, out, _ = ask("--checks", 0, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["words"][0]["check"] is None
    assert set(report["words"][0]["risk"]) == {"logprob"}


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--method", "vaar"), 2, "Did you mean 'var'?"),
        (("--detector", "svarr", "--checks", 0), 2, "Did you mean 'svar'?"),
        (("--detector", "lookback_ratio"), 2, "says nothing before it is fitted"),
        (("--html", "."), 2, "--html . is a folder"),
        (("--check-share", 0.9), 2, "check_share is 0.9"),
    ],
)
def test_mistakes_are_reported(ask, more, code, message):
    ran = ask(*more)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(ask, pictures):
    code, out, err = ask("--html", pictures[0] / "out.html")
    assert (code, out) == (1, "")
    assert f"cannot write to {pictures[0]}" in err
    assert "embedded model" not in err


def test_a_missing_picture_is_named(ask):
    code, _, err = ask(image="gone.png")
    assert code == 1
    assert "image gone.png does not exist" in err
