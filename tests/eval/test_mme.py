"""MME as published, under the readings of three evaluators."""

import json

import pytest

from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.mme import (
    COGNITION,
    HALLUCINATION,
    PERCEPTION,
    read_official,
    score_mme,
)


def _write(path, rows):
    keys = ("task", "image", "question", "label", "answer")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return path


def _totals(result):
    return {name: entry["value"] for name, entry in result["metrics"].items()}


def test_published_totals_and_tasks_are_reproduced(golden, tmp_path):
    case = golden("mme.json")
    path = _write(tmp_path / "answers.jsonl", case["rows"])
    official = case["expected"]["official"]
    result = score_mme(path, parser="official", n_resamples=5)
    assert _totals(result)["perception"] == pytest.approx(official["perception_total"], rel=1e-13)
    assert _totals(result)["cognition"] == pytest.approx(official["cognition_total"], rel=1e-13)
    for task, expected in official["per_task"].items():
        ours = {k: v["value"] for k, v in result["categories"][task]["metrics"].items()}
        assert ours["accuracy"] == pytest.approx(expected["acc"])
        assert ours["accuracy_plus"] == pytest.approx(expected["acc_plus"])
        assert ours["points"] == pytest.approx(expected["score"], rel=1e-13)
        assert ours["precision"] == pytest.approx(expected["precision"])
        assert ours["recall"] == pytest.approx(expected["recall"])
        assert ours["unparsed"] == expected["other_num"]
    subset = sum(official["per_task"][task]["score"] for task in HALLUCINATION)
    assert _totals(result)["hallucination"] == pytest.approx(subset)


def test_other_evaluators_are_reproduced(golden, tmp_path):
    case = golden("mme.json")
    path = _write(tmp_path / "answers.jsonl", case["rows"])
    lmms = _totals(score_mme(path, parser="lmms_eval", n_resamples=5))
    assert lmms["perception"] == pytest.approx(
        case["expected"]["lmms_eval"]["mme_perception_score"]
    )
    assert lmms["cognition"] == pytest.approx(case["expected"]["lmms_eval"]["mme_cognition_score"])
    kit = _totals(score_mme(path, parser="vlmevalkit", n_resamples=5))
    assert kit["perception"] == pytest.approx(case["expected"]["vlmevalkit"]["perception"])
    assert kit["cognition"] == pytest.approx(case["expected"]["vlmevalkit"]["reasoning"])


def test_published_answers_score_as_on_the_leaderboard(golden, data_folder, tmp_path):
    expected = golden("mme.json")["lavin"]["expected"]["official"]
    result = score_mme(
        data_folder / "mme/LaVIN", parser="official", output=tmp_path / "out", n_resamples=5
    )
    totals = _totals(result)
    assert totals["perception"] == pytest.approx(expected["perception_total"], rel=1e-13)
    assert totals["cognition"] == pytest.approx(expected["cognition_total"], rel=1e-13)
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == 2374


def test_every_tricky_answer_is_read_as_the_original_reads_it(golden):
    for item in golden("pope_answers.json")["items"]:
        read = read_official(item["answer"])
        assert (read or "other") == item["expected"]["mme_official"], item["answer"]


def test_a_total_without_all_of_its_tasks_is_undefined(tmp_path):
    rows = [(task, "1.jpg", "?", label, label) for task in HALLUCINATION for label in ("Yes", "No")]
    result = score_mme(_write(tmp_path / "a.jsonl", rows), n_resamples=20)
    assert _totals(result)["hallucination"] == 800
    assert _totals(result)["perception"] is None
    assert result["absent_tasks"] == [*PERCEPTION[4:], *COGNITION]


def test_images_of_equal_name_in_two_tasks_are_two_images(tmp_path):
    rows = [(task, "1.png", "?", "Yes", "Yes") for task in ("OCR", "count") for _ in range(2)]
    assert score_mme(_write(tmp_path / "a.jsonl", rows), n_resamples=5)["n_images"] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("count", "1.jpg", "?", "Yes", "Yes")], "two per image"),
        ([("count", f"{i}.jpg", "?", "Yes", "Yes") for i in range(2)], "followed by one about"),
        ([("counting", "1.jpg", "?", "Yes", "Yes")], "commonsense_reasoning"),
        ([("count", "1.jpg", "?", "maybe", "Yes")], "expected Yes or No"),
    ],
)
def test_bad_input_is_refused_by_name(rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        score_mme(_write(tmp_path / "answers.jsonl", rows))


def test_a_torn_line_of_the_published_layout_is_named(tmp_path):
    (tmp_path / "count.txt").write_text("1.jpg\tIs it?\tYes\n")
    with pytest.raises(DataError, match=r"count\.txt, line 1"):
        score_mme(tmp_path)
    (tmp_path / "count.txt").unlink()
    with pytest.raises(DataError, match="holds no TASK"):
        score_mme(tmp_path)
