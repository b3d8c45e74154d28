"""``vlm-steer calibrate`` on the embedded model."""

import json
from pathlib import Path

import pytest

from vlm_steer.commands import calibrate
from vlm_steer.commands.calibrate import embedded_samples, read_samples
from vlm_steer.errors import DataError


def test_embedded_samples_are_balanced_and_true():
    from vlm_steer.tiny.scenes import scene

    samples = embedded_samples(8)
    assert [sample.answer for sample in samples] == ["yes", "yes", "no", "no"] * 2
    for index, sample in enumerate(samples):
        there = [thing.category for thing in scene("validation", index).objects]
        asked = any(f" {name} " in sample.question for name in there)
        assert asked == (sample.answer == "yes")


def test_the_command_writes_a_file_that_the_method_reads(run, tmp_path, monkeypatch):
    # Which heads help is chance at this size, so the accuracies are planted; the first is without.
    measure = calibrate._Accuracy.of

    def of(self, method):
        real = measure(self, method)
        assert 0 <= real <= 1
        return 0.5 if method is None or method.head_list != {1: (2,)} else 0.75

    monkeypatch.setattr(calibrate._Accuracy, "of", of)
    path = tmp_path / "out" / "heads.json"
    options = ["--limit", 4, "--max-new-tokens", 1, "--set", "act.layers=[1, 2]"]
    ran = run("calibrate", "act", "--model", "tiny", "--output", path, *options)
    assert ran.code == 0, ran.err
    written = json.loads(path.read_text())
    assert written["heads"] == {"1": [2]}
    assert written["accuracy_without"] == 0.5

    import vlm_steer

    model, _ = vlm_steer.load_tiny()
    with vlm_steer.steer(model, {"method": "act", "head_list": str(path)}) as steering:
        assert steering.status()["methods"][0]["layers"] == [1]


def test_a_method_without_anything_to_calibrate_is_refused(run, tmp_path):
    ran = run("calibrate", "pai", "--model", "tiny", "--output", tmp_path / "x.json")
    assert ran.code == 2
    assert "pai has nothing to calibrate" in ran.err


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "1 is not JSON"), ('{"image": "a.png"}', "1 must be an object"), ("", "no samples")],
)
def test_a_bad_data_file_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=message):
        read_samples(path, None)


def test_samples_are_read_relative_to_their_file(tmp_path, pictures):
    path = pictures[0].parent / "data.jsonl"
    line = {"image": pictures[0].name, "question": "Is it red?", "answer": "Yes"}
    path.write_text(json.dumps(line) + "\n\n" + json.dumps(line) + "\n")
    assert [sample.question for sample in read_samples(path, 1)] == ["Is it red?"]
    assert len(read_samples(path, None)) == 2
