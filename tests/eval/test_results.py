"""From answers to comparisons."""

import pytest

from vlm_steer_eval.benchmarks.chair import TableNormaliser
from vlm_steer_eval.benchmarks.tasks import ChairTask, Item, PopeTask
from vlm_steer_eval.benchmarks.vocabulary import ObjectVocabulary
from vlm_steer_eval.reports.evaluation import evaluation_blocks
from vlm_steer_eval.reports.tables import comparison_tables, footnotes, parser_line, render
from vlm_steer_eval.running.images import SceneImage
from vlm_steer_eval.running.results import auroc, evaluate, score_all
from vlm_steer_eval.running.runner import RunResult


def _record(text, changed=None, truncated=False, margin=None):
    return {"text": text, "changed": changed, "truncated": truncated, "margin": margin}


def _pope(n=40):
    items = [
        Item(
            id=str(i),
            image=SceneImage("iid", 100_000 + i),
            prompt="Is there a dog?",
            split="random" if i % 2 else "popular",
            cluster=str(i // 2),
            gold={"label": "yes" if i % 4 < 2 else "no"},
        )
        for i in range(n)
    ]
    answers = {
        "none": [_record("Yes", margin=1.0 + i) for i in range(n)],
        "better": [_record(item.gold["label"], changed=True, margin=0.0) for item in items],
        "idle": [_record("Yes", changed=False, margin=1.0 + i) for i in range(n)],
        "mute": [_record("", changed=True) for _ in range(n)],
    }
    records = {
        arm: dict(zip(map(str, range(n)), rows, strict=True)) for arm, rows in answers.items()
    }
    return PopeTask(items), RunResult(records, [])


def test_a_real_improvement_is_significant_and_an_idle_arm_is_named():
    task, run = _pope()
    scores = evaluate(task, run, score_all(task, run), n_resamples=500)
    assert list(scores["arms"]["none"]) == ["popular", "random", "all"]
    better = scores["differences"]["better"]["all"]["accuracy"]
    assert better["value"] == 0.5
    assert better["p_holm"] < 0.05
    assert better["mcnemar_p"] < 1e-5
    assert scores["differences"]["idle"]["all"]["accuracy"]["p_holm"] == 1.0
    assert scores["changed_nothing"] == ["idle"]
    assert scores["arms"]["none"]["all"]["metrics"]["yes_ratio"]["value"] == 1.0
    assert "none" not in scores["differences"]


def test_controls_are_not_corrected_for_and_make_no_method_look_worse():
    task, run = _pope()
    alone = evaluate(task, run, score_all(task, run), n_resamples=100)
    run.records["sham:better"] = run.records["better"]
    run.records["trivial:num_beams=5"] = run.records["idle"]
    scores = evaluate(task, run, score_all(task, run), n_resamples=100)
    assert scores["uncorrected"] == ["sham:better", "trivial:num_beams=5"]
    for arm in ("better", "idle", "mute"):
        assert scores["differences"][arm] == alone["differences"][arm]
    control = scores["differences"]["sham:better"]["all"]["accuracy"]
    assert "p_holm" not in control
    assert control["p"] == scores["differences"]["better"]["all"]["accuracy"]["p"]


def test_unread_and_empty_answers_are_counted_apart():
    task, run = _pope()
    scores = evaluate(task, run, score_all(task, run), n_resamples=20)
    mute = scores["arms"]["mute"]["all"]
    assert mute["empty"] == 40
    assert mute["metrics"]["unparsed"]["value"] == 40
    assert mute["metrics"]["accuracy"]["value"] == 0
    assert mute["metrics"]["f1"]["value"] is None
    # The published rule calls silence a yes, which the sensitivity line shows.
    assert scores["parsers"]["mute"]["official"]["accuracy"] == 0.5
    assert "spread 50.0 points" in parser_line(scores["parsers"]["mute"], "robust")


def test_tables_show_what_a_gain_could_hide_behind():
    task, run = _pope()
    scores = evaluate(task, run, score_all(task, run), n_resamples=500)
    text = render(*comparison_tables(scores), *footnotes(scores), width=220)
    for word in ("yes_ratio", "unparsed", "truncated", "AUROC", "idle (changed nothing)", "parser"):
        assert word in text
    assert "+50.0*" in text


def test_auroc_counts_ties_half_and_needs_both_sides():
    assert auroc([3.0, 1.0, 2.0, 0.0], [True, False, True, False]) == 1.0
    assert auroc([1.0, 1.0], [True, False]) == 0.5
    assert auroc([2.0, 3.0, None], [True, False, True]) == 0.0
    assert auroc([1.0, 2.0], [True, True]) is None
    assert auroc([None, None], [True, False]) is None


def _chair():
    vocabulary = ObjectVocabulary.from_names(["dog", "cat"])
    gold = {"objects": ["dog"]}
    items = [
        Item(str(i), SceneImage("iid", 100_000 + i), "Describe.", "iid", str(i), gold)
        for i in range(12)
    ]
    records = {
        "none": {str(i): _record("A dog and two <cats>.") for i in range(12)},
        "short": {str(i): _record("A dog.", changed=True, truncated=True) for i in range(12)},
    }
    return ChairTask(items, TableNormaliser(vocabulary)), RunResult(records, [])


def test_chair_stands_beside_recall_length_and_truncation():
    task, run = _chair()
    scores = evaluate(task, run, score_all(task, run), n_resamples=200)
    difference = scores["differences"]["short"]["iid"]
    assert difference["CHAIRi"]["value"] == -0.5
    assert difference["CHAIRs"]["mcnemar_p"] == pytest.approx(2 / 2**12)
    assert difference["Recall"]["value"] == 0
    assert difference["Len"]["value"] == -3
    assert scores["arms"]["short"]["iid"]["truncated"] == 12
    text = render(*comparison_tables(scores), width=220)
    for word in ("CHAIRi", "Recall", "Len", "truncated"):
        assert word in text


def test_report_marks_hallucinated_words_and_escapes_what_models_say():
    from vlm_steer.report import Report, render_html

    task, run = _chair()
    scores = score_all(task, run)
    summary = evaluate(task, run, scores, n_resamples=50)
    html = render_html(Report("t", "s", evaluation_blocks(task, run, scores, summary, n_samples=2)))
    assert '<mark class="wrong" title="cat: not in the image">cats</mark>' in html
    assert '<mark class="right" title="dog: there">dog</mark>' in html
    assert "<cats>" not in html
    assert html.count('<img src="data:image/png;base64,') == 2


def test_a_run_without_comparison_has_no_difference_chart():
    task, run = _pope()
    run = RunResult({"none": run.records["none"]}, [])
    scores = score_all(task, run)
    summary = evaluate(task, run, scores, n_resamples=20)
    assert summary["differences"] == {}
    titles = [block.title for block in evaluation_blocks(task, run, scores, summary, n_samples=0)]
    assert not any("change against" in title for title in titles)
