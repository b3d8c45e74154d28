"""POPE's relatives: dialogues, edited pictures, captions instead of answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.beaf import BEAF_METRICS, BeafQuestion, beaf_counts, score_beaf
from vlm_steer_eval.benchmarks.opope import mentions_by_table, mentions_by_word, score_opope
from vlm_steer_eval.benchmarks.questions import load_questions
from vlm_steer_eval.benchmarks.scoring import score_pope
from vlm_steer_eval.benchmarks.vocabulary import ObjectVocabulary


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _values(result):
    return {name: entry["value"] for name, entry in result["metrics"].items()}


def test_captions_answer_pope_as_published(golden, tmp_path):
    case = golden("opope.json")
    captions = _write(
        tmp_path / "captions.jsonl",
        [{"image_id": image, "caption": text} for image, text in case["captions"].items()],
    )
    questions = _write(
        tmp_path / "questions.jsonl",
        [
            {
                "question_id": number,
                "image": f"COCO_val2014_{row['image_id']:012d}.jpg",
                "text": f"Is there a {row['object']} in the image?",
                "label": row["label"],
            }
            for number, row in enumerate(case["rows"])
        ],
    )
    result = score_opope(captions, questions, reader="halc", output=tmp_path / "out", n_resamples=5)
    ours = _values(result)
    for name in ("accuracy", "precision", "recall", "f1"):
        assert ours[name] == pytest.approx(case[name])
    assert ours["f_0.2"] == pytest.approx(case["f_beta_0_2"])
    samples = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [int(s["parsed"] == "yes") for s in samples] == [row["pred"] for row in case["rows"]]


def test_captions_are_read_in_whole_words_by_default():
    table = mentions_by_table(ObjectVocabulary.coco())
    assert mentions_by_word("hot dog", "hot food")
    assert not table("hot dog", "hot food")
    assert table("cat", "two cats on a mat")
    assert not table("cat", "cattle on a field")
    assert table("sky", "a bright Sky")  # no COCO object
    assert not table("sky", "a skyscraper")


def test_an_image_without_or_with_two_captions_is_named(question_file, tmp_path):
    captions = _write(tmp_path / "c.jsonl", [{"image_id": "scene_0.png", "caption": "a car"}])
    with pytest.raises(DataError, match="no caption for 3 of the 4 images"):
        score_opope(captions, question_file)
    result = score_opope(captions, question_file, missing="exclude", n_resamples=5)
    assert _values(result)["accuracy"] == 1
    _write(captions, [{"image_id": "scene_0.png", "caption": "a car"}] * 2)
    with pytest.raises(DataError, match="two captions"):
        score_opope(captions, question_file)


def test_changes_under_editing_are_counted_as_published(golden, tmp_path):
    case = golden("beaf.json")
    questions = _write(tmp_path / "questions.jsonl", case["qna"])
    for run in case["runs"]:
        rows = [
            {"id": question["id"], "answer": text}
            for question, text in zip(case["qna"], run["answers"], strict=True)
        ]
        answers = _write(tmp_path / "answers.jsonl", rows)
        result = score_beaf(questions, answers, parser="official", n_resamples=5)
        ours = _values(result)
        for name, value in run["expected"].items():
            assert 100 * ours[name] == pytest.approx(value), name
        assert result["n_images"] == sum(q["image"].count("_") == 0 for q in case["qna"]) / 6


def test_an_unreadable_answer_repeats_the_previous_one_only_as_published(tmp_path):
    rows = [
        {"id": 0, "image": "a.jpg", "question": "q", "gt": "yes"},
        {"id": 1, "image": "a_00.jpg", "question": "q", "gt": "yes"},
    ]
    flags = [{"orig_img": True, "removed_q": False}, {"orig_img": False, "removed_q": False}]
    questions = _write(
        tmp_path / "q.jsonl", [row | flag for row, flag in zip(rows, flags, strict=True)]
    )
    answers = _write(tmp_path / "a.jsonl", [{"id": 0, "text": "Yes"}, {"id": 1, "text": "?"}])
    official = _values(score_beaf(questions, answers, parser="official", n_resamples=5))
    ours = _values(score_beaf(questions, answers, n_resamples=5))
    assert (official["accuracy"], official["ID"]) == (1.0, 0.0)
    assert (ours["accuracy"], ours["ID"], ours["unparsed"]) == (0.5, 1.0, 1)


@given(st.lists(st.sampled_from(["yes", "no", None]), min_size=4, max_size=4))
def test_every_removed_object_changes_in_one_way_or_is_unread(answers):
    questions = [
        BeafQuestion(str(i), "x.jpg" if i < 2 else "x_01.jpg", "ab"[i % 2], label, i < 2, i == 2)
        for i, label in enumerate(("yes", "no", "no", "no"))
    ]
    rows = beaf_counts(questions, answers)
    removed = dict(zip(BEAF_METRICS.columns, rows[2], strict=True))
    ways = ("understood", "ignorant", "stubborn_yes", "stubborn_no")
    assert sum(removed[way] for way in ways) == (None not in (answers[0], answers[2]))
    assert sum(row[BEAF_METRICS.columns.index("untouched")] for row in rows) == 1


def test_bad_pairs_are_named(tmp_path):
    row = {"id": 1, "image": "a_00.jpg", "question": "q", "gt": "no"}
    path = _write(tmp_path / "q.jsonl", [row | {"orig_img": False, "removed_q": True}])
    with pytest.raises(DataError, match="not asked about the original"):
        score_beaf(path, path)
    for malformed in (row, {name: row[name] for name in ("id", "image", "gt")}):
        _write(path, [malformed])
        with pytest.raises(DataError, match="orig_img"):
            score_beaf(path, path)
    _write(path, [row | {"orig_img": True, "removed_q": False}] * 2)
    with pytest.raises(DataError, match="more than once"):
        score_beaf(path, path)


def test_the_turns_of_a_dialogue_are_scored_one_by_one(data_folder, tmp_path):
    path = data_folder / "pope/coco_chat/coco_pope_chat_random.json"
    questions = load_questions(path, dialogues=True)
    assert len(questions) == 3000
    dialogues = [json.loads(line) for line in path.read_text().splitlines()]
    answers = _write(
        tmp_path / "answers.jsonl",
        [{"chat_id": d["chat_id"], "answer": ["Yes"] * 3 + d["label"][3:]} for d in dialogues],
    )
    result = score_pope(path, answers, n_resamples=20, output=tmp_path / "out")
    parts = {name: _values(part)["accuracy"] for name, part in result["categories"].items()}
    assert parts["turn 6"] == 1
    assert parts["turn 1"] == sum(d["label"][0] == "yes" for d in dialogues) / 500
    assert result["n_images"] == len({d["image"] for d in dialogues})
    with pytest.raises(DataError, match="multi-turn"):
        load_questions(path)  # generating for them would drop the earlier turns


def test_broken_dialogues_are_named(tmp_path):
    row = {"chat_id": 1, "image": "a.jpg", "text": ["q", "r"], "label": ["yes"]}
    path = _write(tmp_path / "q.jsonl", [row])
    with pytest.raises(DataError, match="as many labels"):
        load_questions(path, dialogues=True)
    _write(path, [row | {"label": ["yes", "no"]}])
    answers = _write(tmp_path / "a.jsonl", [{"chat_id": 1, "answer": "Yes"}])
    with pytest.raises(DataError, match="list of texts"):
        score_pope(path, answers)


def test_a_picture_and_its_edited_copy_are_a_pair(data_folder, tmp_path):
    path = data_folder / "popev2/annotations.json"
    rows = json.loads(path.read_text())
    answers = _write(
        tmp_path / "answers.jsonl",
        [{"question_id": r["image_name"], "answer": "Yes"} for r in rows],
    )
    result = score_pope(path, answers, n_resamples=20)
    assert (result["n"], result["n_images"], result["pairs"]["n"]) == (1000, 500, 500)
    assert result["pairs"]["metrics"]["pair_accuracy"]["value"] == 0
    assert _values(result["categories"]["original"])["accuracy"] == 1
    assert _values(result["categories"]["removed"])["yes_ratio"] == 1


def test_the_early_question_file_of_2910_questions_is_scored_whole(data_folder, tmp_path):
    path = data_folder / "pope/coco_opera_variant/coco_pope_random.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    answers = _write(
        tmp_path / "answers.jsonl",
        [{"question_id": row["question_id"], "answer": row["label"]} for row in rows],
    )
    result = score_pope(path, answers, n_resamples=5)
    assert result["n"] == 2910
    assert _values(result)["accuracy"] == 1
