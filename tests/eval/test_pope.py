"""Reading yes/no answers as published evaluators do, and more carefully."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_steer.errors import ConfigError
from vlm_steer_eval.benchmarks.pope import PARSERS, POPE_METRICS, parse_answer, pope_counts
from vlm_steer_eval.statistics.metrics import summarise


def _metrics(parser, answers, labels, clusters=None):
    rows = [
        pope_counts(parse_answer(parser, answer, label))
        for answer, label in zip(answers, labels, strict=True)
    ]
    clusters = clusters or [str(i) for i in range(len(rows))]
    table = summarise(POPE_METRICS, rows, clusters, n_resamples=50)
    return {name: entry["value"] for name, entry in table.items()}


def test_every_tricky_answer_is_read_as_the_original_reads_it(golden):
    for item in golden("pope_answers.json")["items"]:
        answer, label, expected = item["answer"], item["label"], item["expected"]
        read = {name: parse_answer(name, answer, label) for name in PARSERS}
        for name in ("official", "opera", "spin"):
            assert read[name].answer == expected[name], (name, answer)
        assert read["vcd"].cell == expected["vcd_outcome"], answer
        assert (read["lmms_eval"].cell in ("TP", "TN")) == expected["lmms_eval_correct"], answer
        word = read["vlmevalkit"].answer
        assert (word.capitalize() if word else "Unknown") == expected["vlmevalkit"], answer


def test_degenerate_answer_sets_give_null_where_a_ratio_has_no_denominator(golden):
    for case in golden("pope_answers.json")["edge_cases"].values():
        answers = [item["answer"] for item in case["items"]]
        labels = [item["label"] for item in case["items"]]
        for parser in ("official", "vcd"):
            ours = _metrics(parser, answers, labels)
            for name, value in case[parser].items():
                # The original divides by zero before it knows the metrics that come later.
                if name != "error" and value is not None:
                    assert ours[name] == value, (parser, name)
            if case[parser]["error"]:
                assert ours["f1"] is None


def test_published_answers_score_as_published(golden, data_folder):
    expected = golden("pope_real_expected.json")["results"]
    names = {"f1_score": "f1", "Precision": "precision", "Recall": "recall", "F1": "f1"}
    names |= {"ACC": "accuracy", "Yes Ratio": "yes_ratio"}
    files = {"repope": "repope/coco_repope_{}.json"}
    for key, answers in golden("pope_real_answers.json.gz").items():
        split = key.split("/")[0]
        official = data_folder / f"pope/coco/coco_pope_{split}.json"
        ids = [json.loads(line)["question_id"] for line in official.read_text().splitlines()]
        by_id = dict(zip(ids, answers, strict=True))
        for parser, values in expected[key].items():
            path = data_folder / "pope" / files.get(parser, "coco/coco_pope_{}.json").format(split)
            questions = [json.loads(line) for line in path.read_text().splitlines()]
            ours = _metrics(
                parser,
                [by_id[question["question_id"]] for question in questions],
                [question["label"] for question in questions],
            )
            for name, value in values.items():
                assert ours[names.get(name, name)] == value, (key, parser, name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("YES!", "yes"),
        ("**No**", "no"),
        ("no;", "no"),
        ("The answer is: yes.", "yes"),
        ("Final answer: No", "no"),
        ("Yes, there is no doubt", "yes"),
        ("No\u200b.", "no"),
        ("<|assistant|> No <|im_end|>", "no"),
        ("There isn’t any dog", "no"),
        ("I cannot see a dog.", "no"),
        ("Ｙｅｓ", "yes"),
        ("", None),
        ("   ", None),
        ("...", None),
        ("Yes and no", None),
        ("No, yes", None),
        ("I am not sure, unclear", None),
        ("A dog on the eyes of a snowboard", None),
        ("Nein", None),
        ("Noah knows", None),
    ],
)
def test_robust_reading_follows_the_opening_word_and_admits_ignorance(text, expected):
    assert parse_answer("robust", text, "yes").answer == expected


@given(st.text(max_size=60), st.sampled_from(["yes", "no"]), st.sampled_from(sorted(PARSERS)))
def test_no_text_breaks_a_parser_or_lands_in_a_wrong_cell(text, label, parser):
    verdict = parse_answer(parser, text, label)
    if verdict.cell is not None:
        assert (verdict.cell in ("TP", "FN")) == (label == "yes")
    assert sum(pope_counts(verdict)[:4]) <= 1


def test_an_unread_answer_is_never_a_yes_and_never_correct_by_default():
    for label in ("yes", "no"):
        verdict = parse_answer("robust", "", label)
        assert not verdict.said_yes
        assert verdict.counted
        assert verdict.cell not in ("TP", "TN")
    assert _metrics("robust", ["", "Yes"], ["no", "yes"])["unparsed"] == 1


def test_an_unknown_parser_is_refused_with_the_list_of_known_ones():
    with pytest.raises(ConfigError, match="robust"):
        parse_answer("strict", "Yes", "yes")
