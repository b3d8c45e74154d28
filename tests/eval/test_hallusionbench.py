"""HallusionBench as published, from verdicts, and from yes and no alone."""

import json
from collections import Counter

import numpy as np
import pytest

from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.hallusionbench import (
    HALLUSION_METRICS,
    cluster_counts,
    judge_prompt,
    load_hallusion,
    score_hallusionbench,
)
from vlm_steer_eval.benchmarks.judge import RecordedJudge

VERDICTS = {"0": "wrong", "1": "right", "2": "unclear"}


@pytest.fixture
def question_path(data_folder):
    return data_folder / "hallusionbench/HallusionBench.json"


def _values(questions, verdicts):
    rows = cluster_counts(questions, verdicts)
    metrics = HALLUSION_METRICS.evaluate(np.array(list(rows.values()), dtype=float).sum(0))
    return {name: float(value) for name, value in metrics.items()}


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _answer(question, text):
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return {**{key: getattr(question, key) for key in keys}, "model_prediction": text}


def test_published_numbers_are_reproduced_from_verdicts(golden, question_path):
    questions = load_hallusion(question_path)
    for run in golden("hallusionbench.json")["runs"]:
        verdicts = [VERDICTS[run["labels"][question.id][0]] for question in questions]
        ours, official = _values(questions, verdicts), run["official"]
        for name in ("aAcc", "fAcc", "qAcc", "easy", "hard"):
            assert round(100 * ours[name], 4) == official["leaderboard"][name], (run["name"], name)
        for category in ("VD", "VS"):
            chosen = [i for i, q in enumerate(questions) if q.category == category]
            part = _values([questions[i] for i in chosen], [verdicts[i] for i in chosen])
            pair = official[category]["pair"]
            assert part["qAcc"] == pytest.approx(pair["correct"] / pair["total"])
        if "error" in official["yes_ratio"]:
            assert np.isnan(ours["false_positive_ratio"])
        else:
            assert ours["yes_difference"] == pytest.approx(official["yes_ratio"]["diff"])
            assert ours["false_positive_ratio"] == pytest.approx(official["yes_ratio"]["fp"])


def test_answers_are_read_as_lmms_eval_reads_them(golden, question_path, tmp_path):
    questions = load_hallusion(question_path)
    for run in golden("hallusionbench.json")["runs"][:2]:
        rows = [_answer(question, run["labels"][question.id][2]) for question in questions]
        result = score_hallusionbench(
            question_path,
            _write(tmp_path / "answers.jsonl", rows),
            parser="lmms_intern",
            images_only=True,
            n_resamples=5,
        )
        assert result["n"] == 951
        for name, value in run["lmms_eval_yes_substring_image_only"].items():
            assert result["metrics"][name]["value"] == pytest.approx(value), name


def test_a_judge_gives_the_published_numbers_from_its_replies(golden, question_path, tmp_path):
    questions = load_hallusion(question_path)
    run = golden("hallusionbench.json")["runs"][0]
    words = {"0": "It is Incorrect.", "1": "correct", "2": "unclear"}
    labels = run["labels"]
    replies = [{"id": q.id, "reply": words[labels[q.id][0]]} for q in questions]
    result = score_hallusionbench(
        question_path,
        _write(tmp_path / "a.jsonl", [_answer(q, labels[q.id][2]) for q in questions]),
        judge=RecordedJudge(_write(tmp_path / "replies.jsonl", replies)),
        n_resamples=5,
    )
    for name in ("aAcc", "fAcc", "qAcc", "easy", "hard"):
        value = result["metrics"][name]["value"]
        assert round(100 * value, 4) == run["official"]["leaderboard"][name]
    assert result["judge"] == "recorded:replies.jsonl"
    prompt = judge_prompt(questions[0], "No.")
    assert questions[0].details in prompt
    assert prompt.index("No.") > prompt.index(questions[0].text)


def test_right_answers_score_one_and_silence_is_right_only_without_a_picture(
    question_path, tmp_path
):
    questions = load_hallusion(question_path)
    right = _write(tmp_path / "a.jsonl", [_answer(q, f"{q.label}.") for q in questions])
    perfect = score_hallusionbench(question_path, right, n_resamples=20, output=tmp_path / "out")
    assert perfect["metrics"]["qAcc"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert perfect["n"] == 1129
    silent = _write(tmp_path / "b.jsonl", [_answer(q, "") for q in questions])
    blind = Counter(question.is_blind for question in questions)[True]
    values = score_hallusionbench(question_path, silent, n_resamples=5)["metrics"]
    assert values["aAcc"]["value"] == pytest.approx(blind / 1129)
    assert values["unclear"]["value"] == 1129
    assert values["fAcc"]["value"] == 0
    assert set(perfect["categories"]) >= {"VD", "VS", "VD_illusion", "VS_chart"}


def test_missing_and_repeated_answers_are_named(question_path, tmp_path):
    questions = load_hallusion(question_path)
    path = _write(tmp_path / "a.jsonl", [_answer(q, "Yes") for q in questions[:3]])
    with pytest.raises(DataError, match="no answer for 1126 of the 1129"):
        score_hallusionbench(question_path, path)
    assert score_hallusionbench(question_path, path, missing="exclude", n_resamples=5)["n"] == 3
    _write(path, [_answer(questions[0], "Yes")] * 2)
    with pytest.raises(DataError, match="answered before"):
        score_hallusionbench(question_path, path)
    _write(path, [{"answer": "Yes"}])
    with pytest.raises(DataError, match="model_prediction"):
        score_hallusionbench(question_path, path)
    with pytest.raises(DataError, match="gt_answer"):
        score_hallusionbench(path, path)
