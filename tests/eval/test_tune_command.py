"""`vlm-steer tune` from a file to a steering that loads."""

import json

import pytest
from typer.testing import CliRunner

import vlm_steer
from vlm_steer.cli import build_app
from vlm_steer.config import resolve

FILE = """
methods:
  - method: pai
    gamma: 1.0
    alpha: {min: 0.1, max: 1.0}
tune:
  data:
    chair: {scenes: validation, max_new_tokens: 12}
  held_out:
    chair: {scenes: broken, max_new_tokens: 12}
  objectives: {chair_i: min, recall: max, cost: min}
  constraints: {recall: {at_least: baseline - 50}, passes: {at_most: 1.5}}
  trials: 2
  images: 2
  held_out_images: 2
"""


def invoke(*arguments):
    return CliRunner().invoke(build_app(), ["tune", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    path = folder / "pai.yaml"
    path.write_text(FILE)
    result = invoke(path, "--output", folder / "out", "--resamples", 200)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return path, folder / "out", result


def test_the_winner_is_a_steering_with_its_provenance(finished, tiny):
    _, out, _ = finished
    text = (out / "best.yaml").read_text()
    for said in ("trial", "Model: tiny", "Tuned on 2 images", "Versions: vlm-steer", "Study: "):
        assert said in text
    assert "On held-out images:" in text
    (method,) = resolve(out / "best.yaml")
    assert 0.1 <= method.alpha <= 1.0
    with vlm_steer.steer(tiny[0], str(out / "best.yaml"), processor=tiny[1]):
        pass


def test_the_confirmation_is_printed_whatever_it_says(finished):
    _, out, result = finished
    assert "Held-out images" in result.stdout
    assert "CHAIR · broken · 2 answers" in result.stdout
    summary = json.loads((out / "tune.json").read_text())
    assert summary["n_trials"] == 2
    assert {"value", "ci95", "p"} <= summary["held_out"]["chair_i"]["difference"].keys()
    assert summary["held_out"]["cost"]["value"] > 0
    assert summary["held_out"]["passes"]["value"] == pytest.approx(1.0, abs=0.3)
    assert "The front of 2 trials" in (out / "report.html").read_text()


def test_a_finished_study_generates_nothing_again(finished):
    path, out, _ = finished
    logs = {p: p.read_bytes() for p in out.rglob("*.jsonl")}
    again = invoke(path, "--output", out, "--resamples", 200)
    assert again.exit_code == 0
    assert {p: p.read_bytes() for p in out.rglob("*.jsonl")} == logs


def test_a_range_that_the_model_refuses_is_refused_before_the_first_trial(tmp_path):
    path = tmp_path / "deep.yaml"
    path.write_text(FILE.replace("gamma: 1.0", "gamma: 1.0\n    layers: {last: 60}"))
    result = invoke(path, "--output", tmp_path / "out")
    assert "tiny refuses" in str(result.exception)
    assert not (tmp_path / "out").exists()
