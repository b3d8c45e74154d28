"""Benchmarks run from their files: items, whole units, conversations, and the same scores as files.

The embedded model answers, or a stand-in whose answers are known.
"""

import json

import pytest

from vlm_steer.cli import main
from vlm_steer.errors import ConfigError, DataError
from vlm_steer.generation import render_prompt
from vlm_steer_eval.benchmarks.beaf import beaf_task, score_beaf
from vlm_steer_eval.benchmarks.judge import RecordedJudge
from vlm_steer_eval.benchmarks.mme import score_mme
from vlm_steer_eval.benchmarks.mmvp import load_mmvp, mmvp_task, read_choice, score_mmvp
from vlm_steer_eval.benchmarks.opope import opope_task, score_opope
from vlm_steer_eval.benchmarks.published import (
    amber_task,
    hallusion_task,
    mme_task,
    mmhal_task,
)
from vlm_steer_eval.benchmarks.scoring_amber import load_items
from vlm_steer_eval.benchmarks.sycophancy import SYCOPHANCY_METRICS, SycophancyTask, claim, pressed
from vlm_steer_eval.commands import origins
from vlm_steer_eval.reports.tables import footnotes
from vlm_steer_eval.running.arms import parse_arms
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.results import evaluate, score_all
from vlm_steer_eval.running.runner import RunResult, run_arms
from vlm_steer_eval.running.sources import local_pope
from vlm_steer_eval.running.workers import Workers


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _evaluated(task, texts):
    """`scores.json` of a task whose answers are given by item id."""
    records = {
        name: {"text": text, "truncated": False, "changed": None, "margin": None}
        for name, text in texts.items()
    }
    run = RunResult({"none": records, "again": records}, [])
    return evaluate(task, run, score_all(task, run), n_resamples=20)


def test_every_task_of_yes_and_no_is_ranked_by_its_first_token(image_folder, tmp_path):
    questions = tmp_path / "mme"
    questions.mkdir()
    (questions / "color.txt").write_text(
        "a.png\tIs it red?\tYes\na.png\tIs it blue?\tNo\n"
        "b.png\tIs it red?\tYes\nb.png\tIs it blue?\tNo\n"
    )
    task = mme_task(questions, image_folder)
    records = {
        item.id: {"text": "Yes", "truncated": False, "changed": None, "margin": margin}
        for item, margin in zip(task.items, (2.0, -1.0, 1.0, 1.5), strict=True)
    }
    run = RunResult({"none": records}, [])
    summary = evaluate(task, run, score_all(task, run), n_resamples=20)
    found = summary["arms"]["none"]["color"]
    assert found["auroc"] == found["first_token"]["auroc"]["value"] == 0.75
    assert "parsers" not in summary  # those are POPE's


def _values(summary, part="all"):
    return {name: m["value"] for name, m in summary["arms"]["none"][part]["metrics"].items()}


# -- conversations ----------------------------------------------------------------------------
@pytest.fixture
def dialogue_file(tmp_path):
    rows = [
        {
            "chat_id": index,
            "image": f"scene_{index}.png",
            "text": ["Is there a car in the image?", "Is there a dog in the image?", "And a cat?"],
            "label": ["yes", "no", "no"],
        }
        for index in range(3)
    ]
    return _write(tmp_path / "coco_pope_chat_random.json", rows)


def _run(task, tiny, output, workers=None, **options):
    return run_arms(
        task,
        parse_arms("none"),
        *tiny,
        model_name="tiny",
        settings=Settings(max_new_tokens=3),
        batch_size=2,
        output=output,
        workers=workers,
        **options,
    )


def test_every_turn_of_a_dialogue_is_asked_after_its_own_answers(
    tiny, dialogue_file, image_folder, tmp_path
):
    task = local_pope([dialogue_file], image_folder)
    found = _run(task, tiny, tmp_path / "out").records["none"]
    assert [item.split for item in task.items[:3]] == ["turn 1", "turn 2", "turn 3"]
    questions = [item.prompt for item in task.items[:3]]
    for chat in range(3):
        turns = [found[f"random/{chat}/{turn}"] for turn in (1, 2, 3)]
        answers = [turn["text"] for turn in turns]
        for n, turn in enumerate(turns):
            history = list(zip(questions[:n], answers[:n], strict=True))
            assert turn["prompt"] == render_prompt(tiny[1], questions[n], history)
            assert turn["prompt"].count("<image>") == 1
    shared = _run(task, tiny, tmp_path / "shared", share_prefix=True).records["none"]
    assert {k: v["text"] for k, v in shared.items()} == {k: v["text"] for k, v in found.items()}


def test_a_dialogue_torn_in_the_middle_ends_like_an_uninterrupted_one(
    tiny, dialogue_file, image_folder, tmp_path
):
    task = local_pope([dialogue_file], image_folder)
    whole = _run(task, tiny, tmp_path / "once")
    log = (tmp_path / "once/generations.jsonl").read_text().splitlines(keepends=True)
    torn = tmp_path / "twice"
    torn.mkdir()
    (torn / "generations.jsonl").write_text("".join(log[:4]) + log[4][:20])
    again = _run(task, tiny, torn)
    assert again.records == whole.records
    assert again.n_generated == 9 - 4
    with pytest.raises(DataError, match="run the same command again"):
        _run(task, tiny, tmp_path / "alone", workers=Workers(1, 3))


def test_dialogues_of_several_files_do_not_share_their_names(dialogue_file, image_folder):
    other = dialogue_file.with_name("coco_pope_chat_popular.json")
    other.write_text(dialogue_file.read_text())
    items = local_pope([dialogue_file, other], image_folder).items
    assert len({item.id for item in items}) == 18
    assert {item.split for item in items} == {"random", "popular"}


# -- sycophancy -------------------------------------------------------------------------------
def test_claims_are_about_the_object_where_there_is_one():
    question = "Is there an orange in the image?"
    assert claim(question, "yes") == "there is an orange in the image"
    assert claim(question, "no") == "there is no orange in the image"
    assert claim("Is it red?", "no") == "the answer is no"


def test_the_rates_of_pressure_are_those_counted_by_hand(question_file, image_folder):
    plain = local_pope([question_file], image_folder).items
    items = pressed(plain, variants=["leading", "challenge"], stances=["wrong"])
    assert len(items) == 8 * 3
    assert [item.after for item in items[:3]] == [None, None, items[0].id]
    assert "I think there is no car in the image. Is there a car" in items[1].prompt
    texts = {}
    for number, item in enumerate(plain):
        before, after = [  # right stays, right turns, wrong stays, wrong turns right
            (item.gold["label"], item.gold["label"]),
            ("yes", "no"),
            ("no", "no"),
            ("no", "yes"),
        ][number % 4]
        texts[item.id] = before
        texts |= {i.id: after for i in items if i.gold.get("neutral") == item.id}
    summary = _evaluated(SycophancyTask(items), texts)
    parts = ["leading, wrong, mild", "challenge, wrong, mild"]
    assert list(summary["arms"]["none"]) == [*parts, "all"]
    labels = [item.gold["label"] for item in plain]
    pairs = [
        (label, before, after)
        for label, (before, after) in zip(
            labels,
            [(labels[0], labels[0]), ("yes", "no"), ("no", "no"), ("no", "yes")] * 2,
            strict=True,
        )
    ]
    right = [p for p in pairs if p[0] == p[1]]
    wrong = [p for p in pairs if p[0] != p[1]]
    by_hand = {
        "change": sum(b != a for _, b, a in pairs) / 8,
        "accuracy_before": len(right) / 8,
        "error_introduction": sum(a != label for label, _, a in right) / len(right),
        "correction": sum(a == label for label, _, a in wrong) / len(wrong),
        "imbalance": (
            pairs.count(("no", "yes", "no")) + pairs.count(("yes", "yes", "no"))
            - pairs.count(("no", "no", "yes")) - pairs.count(("yes", "no", "yes"))
        ) / sum(b != a for _, b, a in pairs),
    }  # fmt: skip
    for part in parts:
        values = _values(summary, part)
        assert {name: values[name] for name in by_hand} == pytest.approx(by_hand)
    assert set(SYCOPHANCY_METRICS.higher_is_better) < set(SYCOPHANCY_METRICS.formulas)


def test_sycophancy_runs_from_the_command_line_and_resumes(
    capsys, question_file, image_folder, tmp_path
):
    output = tmp_path / "out"
    arguments = [
        "eval", "sycophancy", "--questions", str(question_file), "--images", str(image_folder),
        "--max-new-tokens", "2", "--resamples", "20", "--tones", "mild,strong", "--stances",
        "wrong", "--output", str(output),
    ]  # fmt: skip
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code
    assert "error_introduction" in capsys.readouterr().out
    scores = json.loads((output / "scores.json").read_text())
    assert len(scores["arms"]["none"]) == 5
    assert len((output / "generations.jsonl").read_text().splitlines()) == 8 * 5
    with pytest.raises(SystemExit):
        main([*arguments[:-2], "--variants", "shouting", "--output", str(tmp_path / "x")])
    assert "choose different ones of leading, challenge" in capsys.readouterr().err


def test_the_pictures_of_popev2_are_found_and_counted_in_pairs(image_folder, tmp_path):
    (image_folder / "images").mkdir()
    rows = []
    for n in range(2):
        (image_folder / f"scene_{n}.png").rename(image_folder / f"images/{n}.png")
        (image_folder / f"scene_{n + 2}.png").rename(image_folder / f"{n}.png")
        query = {"image_id": n, "query": "Is there a car in the image?"}
        rows.append(query | {"image_name": f"/images/{n}.png", "label": "No"})
        rows.append(query | {"image_name": f"/{n}.png", "label": "Yes"})
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    task = local_pope([path], image_folder)
    assert all(item.image.load() for item in task.items)
    assert task.items[0].image.path == image_folder / "images/0.png"
    elsewhere = rows[0] | {"image_name": str(image_folder / "images/0.png")}
    path.write_text(json.dumps([elsewhere, rows[1]]))
    assert local_pope([path], tmp_path).items[0].image.load()
    texts = dict(zip((item.id for item in task.items), ("No", "Yes", "Yes", "Yes"), strict=True))
    summary = _evaluated(task, texts)
    assert list(summary["arms"]["none"]) == ["removed", "original", "all"]
    assert summary["pairs"]["none"]["n"] == 2
    assert summary["pairs"]["none"]["metrics"]["pair_accuracy"]["value"] == 0.5
    assert summary["pairs"]["again"]["difference"]["pair_accuracy"]["value"] == 0
    some = {name: text for n, (name, text) in enumerate(texts.items()) if n in (0, 3)}
    assert _evaluated(task, some)["pairs"] == {}
    assert "none: 50.0 % of 2 pairs with both pictures right" in "\n".join(footnotes(summary))


# -- captions and edited pictures -------------------------------------------------------------
def _main(*arguments):
    """Exit code of `vlm-steer ...`."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_captions_of_a_run_answer_questions_as_captions_of_a_file_do(
    question_file, image_folder, tmp_path
):
    texts = {
        "scene_0.png": "A car.", "scene_1.png": "A dog.", "scene_2.png": "A traffic light.",
        "scene_3.png": "Two cars and a traffic jam.",
    }  # fmt: skip
    captions = [{"image": name, "caption": text} for name, text in texts.items()]
    plain = local_pope([question_file], image_folder).items
    for reader in ("table", "halc"):
        task = opope_task(plain, prompt="Describe it.", reader=reader)
        assert [item.prompt for item in task.items] == ["Describe it."] * 4
        by_id = {item.id: texts[item.image.path.name] for item in task.items}
        written = _write(tmp_path / "captions.jsonl", captions)
        expected = score_opope(written, question_file, reader=reader, n_resamples=5)
        summary = _evaluated(task, by_id)
        assert summary["arms"]["none"]["random"]["n"] == 8
        found = _values(summary, "random")
        assert found == {name: m["value"] for name, m in expected["metrics"].items()}
    other = question_file.with_name("pope_popular.jsonl")
    other.write_text(question_file.read_text())
    task = opope_task(local_pope([question_file, other], image_folder).items, prompt="?")
    assert len(task.items) == 4  # one caption answers the questions of both files
    summary = _evaluated(task, by_id)
    assert list(summary["arms"]["none"]) == ["random", "popular", "all"]
    assert _values(summary, "random") == _values(summary, "popular")
    _write(other, [{"question_id": 1, "image": "a.png", "text": "Is it red?", "label": "no"}])
    with pytest.raises(DataError, match="names no object"):
        opope_task(local_pope([other], image_folder).items, prompt="?")


def test_opope_runs_from_the_command_line_resumes_and_is_read_otherwise(
    capsys, question_file, image_folder, tmp_path
):
    data = ["--questions", question_file, "--images", image_folder, "--resamples", 20]
    run = ["eval", "opope", *data, "--methods", "pai", "--max-new-tokens", 4]
    output = tmp_path / "out"
    for _ in range(2):
        assert _main(*run, "--output", output) == 0
        assert len((output / "generations.jsonl").read_text().splitlines()) == 2 * 4
    assert "f_0.2" in capsys.readouterr().out
    again = tmp_path / "again"
    read = ["eval", "opope", *data, "--rescore", output, "--reader", "halc", "--output", again]
    assert _main(*read) == 0
    assert json.loads((again / "scores.json").read_text())["reader"] == "halc"
    assert _main("compare", output, "--resamples", 20, "--output", tmp_path / "compared") == 0
    assert _main("compare", output, again, "--output", tmp_path / "x") == 2


def test_captions_of_the_embedded_scenes_are_read_by_their_categories():
    task = origins.opope_task(scenes="iid", limit=2, seed=0, splits=["random"], prompt="Describe.")
    assert len(task.items) == 2
    asked = task.items[0].gold["questions"][0]
    assert asked.part == "random"
    assert task.mentions(asked.object, f"There is a {asked.object} here.")


@pytest.fixture
def beaf_file(image_folder, tmp_path):
    """Two pictures, each with a copy that lacks an object."""
    rows = []
    for n in range(2):
        (image_folder / f"scene_{n}.png").rename(image_folder / f"img{n}.png")
        (image_folder / f"scene_{n + 2}.png").rename(image_folder / f"img{n}_01.png")
        for edited in (False, True):
            for thing in ("car", "dog"):
                rows.append({
                    "id": len(rows), "image": f"img{n}{'_01' * edited}.png",
                    "question": f"Is there {thing} in this image?",
                    "gt": "no" if edited and thing == "car" else "yes",
                    "orig_img": not edited, "removed_q": edited and thing == "car",
                })  # fmt: skip
    return _write(tmp_path / "beaf_qna.json", rows)


def test_beaf_of_a_run_scores_like_its_answer_file(beaf_file, image_folder, tmp_path):
    for parser in ("robust", "official"):
        task = beaf_task(beaf_file, image_folder, parser=parser, suffix=" One word.")
        assert task.items[0].prompt == "Is there car in this image? One word."
        said = ("Yes", "Hm", "no.", "Yes")
        texts = {item.id: said[n * n % 3 + n % 2] for n, item in enumerate(task.items)}
        rows = [{"id": name, "answer": text} for name, text in texts.items()]
        answers = _write(tmp_path / "answers.jsonl", rows)
        expected = score_beaf(beaf_file, answers, parser=parser, n_resamples=5)
        summary = _evaluated(task, texts)
        assert _values(summary) == {k: m["value"] for k, m in expected["metrics"].items()}
    assert "first_token" in summary["arms"]["none"]["all"]
    # What was asked about an edited picture counts only beside the same about the original.
    fewer = _evaluated(task, {name: text for name, text in texts.items() if name != "0"})
    assert fewer["arms"]["none"]["all"]["n"] == len(texts) - 2
    with pytest.raises(DataError, match="no group of questions of beaf is whole"):
        _evaluated(task, {name: text for name, text in texts.items() if name not in "0145"})
    assert len(beaf_task(beaf_file, image_folder, limit=1).items) == 4
    with pytest.raises(DataError, match="does not exist"):
        beaf_task(beaf_file, tmp_path / "nowhere")


def test_beaf_runs_from_the_command_line_and_resumes(beaf_file, image_folder, tmp_path):
    data = ["--questions", beaf_file, "--images", image_folder, "--resamples", 20]
    run = ["eval", "beaf", *data, "--methods", "pai", "--max-new-tokens", 2]
    output = tmp_path / "out"
    for _ in range(2):
        assert _main(*run, "--output", output) == 0
        assert len((output / "generations.jsonl").read_text().splitlines()) == 2 * 8
    scores = json.loads((output / "scores.json").read_text())
    assert set(scores["arms"]["pai"]["all"]["metrics"]) >= {"TU", "IG", "SBp", "SBn", "ID"}
    again = ["--rescore", output, "--parser", "official", "--output", tmp_path / "again"]
    assert _main("eval", "beaf", *data, *again) == 0
    assert _main("compare", output, "--resamples", 20, "--output", tmp_path / "compared") == 0


# -- published files --------------------------------------------------------------------------
def test_mme_of_a_run_scores_like_its_answer_file(tmp_path):
    rows = [
        (task, f"{image}.jpg", f"Question {n}? Please answer yes or no.", label)
        for task in ("existence", "count", "position", "color")
        for image in range(3)
        for n, label in enumerate(("Yes", "No"))
    ]
    for task in {row[0] for row in rows}:
        lines = ["\t".join(row[1:]) + "\n" for row in rows if row[0] == task]
        (tmp_path / f"{task}.txt").write_text("".join(lines))
    ending = " Please answer yes or no."
    task = mme_task(tmp_path, tmp_path, suffix=" One word.", remove=ending)
    assert task.items[0].prompt == "Question 0? One word."
    texts = {item.id: ("Yes", "No.", "Hm")[n % 3] for n, item in enumerate(task.items)}
    answers = [
        {"task": i.split, "image": i.cluster.partition("/")[2], "label": i.gold["label"],
         "answer": texts[i.id]}
        for i in task.items
    ]  # fmt: skip
    expected = score_mme(_write(tmp_path / "answers.jsonl", answers), n_resamples=5)
    summary = _evaluated(task, texts)
    assert _values(summary) == {k: m["value"] for k, m in expected["metrics"].items()}
    # Without one of its questions an image counts for nothing.
    first = task.items[0].id
    fewer = _evaluated(task, {name: text for name, text in texts.items() if name != first})
    assert fewer["arms"]["none"]["existence"]["n"] == 2
    with pytest.raises(DataError, match="does not end with"):
        mme_task(tmp_path, tmp_path, remove="!")


class _Rater:
    name = "rater"

    def ask(self, prompts):
        return {
            key: f"{'correct' if 'is right' in text else 'unclear'}; "
            f"Rating: {6 if 'A dog' in text else 1}"
            for key, text in prompts.items()
        }


def test_hallusionbench_of_a_run_counts_whole_sets_of_pictures(tmp_path):
    rows = [
        {
            "category": "VD", "subcategory": "map", "set_id": str(s), "figure_id": str(f),
            "question_id": "0", "visual_input": str(f + 1), "question": "Is it?",
            "gt_answer": str(f), "filename": f"./VD/map/{s}_{f}.png",
        }
        for s in range(2) for f in range(2)
    ]  # fmt: skip
    rows.append(rows[0] | {"category": "VS", "visual_input": "0", "filename": None})
    path = tmp_path / "HallusionBench.json"
    path.write_text(json.dumps(rows))
    task = hallusion_task(path, tmp_path, suffix=" Yes or no?", images_only=True)
    assert len(task.items) == 4
    assert task.items[0].image.path == tmp_path / "VD/map/0_0.png"
    values = _values(_evaluated(task, {i.id: "No" for i in task.items}), "VD")
    assert (values["aAcc"], values["fAcc"], values["qAcc"]) == (0.5, 0.5, 0)
    fewer = _evaluated(task, {i.id: "No" for i in task.items[1:]})
    assert fewer["arms"]["none"]["VD"]["n"] == 1
    judged = hallusion_task(path, tmp_path, judge=_Rater())
    assert [item.has_image for item in judged.items] == [True] * 4 + [False]
    answers = {i.id: "It is right." if i.has_image else "Who knows?" for i in judged.items}
    values = _values(_evaluated(judged, answers), "all")
    assert (values["aAcc"], values["unclear"]) == (1, 1)  # "unclear" is right without a picture
    assert judged.scoring["judge"] == "rater"


def test_amber_of_a_run_asks_its_queries(tmp_path):
    (tmp_path / "annotations.json").write_text(
        json.dumps(
            [{"id": n, "type": "discriminative-hallucination", "truth": "no"} for n in (1, 2)]
        )
    )
    (tmp_path / "relation.json").write_text("{}")
    (tmp_path / "safe_words.txt").write_text("")
    with pytest.raises(DataError, match="no query for 2"):
        amber_task(tmp_path, tmp_path, part="discriminative")
    queries = [{"id": n, "image": "AMBER_1.jpg", "query": "Is the sky green?"} for n in (1, 2)]
    _write(tmp_path / "query/query.json", queries)
    task = amber_task(tmp_path, tmp_path, part="discriminative", suffix=" One word.")
    assert [item.prompt for item in task.items] == ["Is the sky green? One word."] * 2
    assert {item.cluster for item in task.items} == {"AMBER_1.jpg"}
    values = _values(_evaluated(task, {"1": "No.", "2": "Yes"}), "existence")
    assert (values["accuracy"], values["recall"]) == (0.5, 0.5)


def test_mmhal_of_a_run_asks_a_judge_that_can_be_asked(tmp_path):
    rows = [
        {"question": "What?", "gt_answer": "A cat.", "image_src": "http://x/y/a.jpg",
         "image_content": ["cat"], "question_type": "other", "image_id": "a"}
    ]  # fmt: skip
    template = tmp_path / "response_template.json"
    template.write_text(json.dumps(rows))

    task = mmhal_task(template, tmp_path, _Rater())
    assert task.items[0].image.path == tmp_path / "a.jpg"
    assert _values(_evaluated(task, {"0": "A dog."}), "other")["rating"] == 6
    assert _values(_evaluated(task, {"0": "?"}), "other")["hallucination_rate"] == 1
    with pytest.raises(ConfigError, match="vlm-steer score"):
        mmhal_task(template, tmp_path, RecordedJudge(tmp_path / "r.jsonl"))


def test_a_question_that_occurs_twice_is_named(tmp_path, image_folder):
    row = {
        "category": "VD", "subcategory": "map", "set_id": "0", "figure_id": "0", "question_id": "0",
        "visual_input": "1", "question": "Is it?", "gt_answer": "1", "filename": "./a.png",
    }  # fmt: skip
    hallusion = tmp_path / "HallusionBench.json"
    hallusion.write_text(json.dumps([row, row]))
    with pytest.raises(DataError, match="1 questions occur more than once"):
        hallusion_task(hallusion, image_folder)
    item = {"id": 7, "type": "relation", "truth": "no"}
    (tmp_path / "annotations.json").write_text(json.dumps([item, item]))
    with pytest.raises(DataError, match=r"more than once \(7\)"):
        load_items(tmp_path, "all")
    (tmp_path / "color.txt").write_text("a.png\tRed?\tYes\na.png\tBlue?\tNo\n" * 2)
    with pytest.raises(DataError, match="2 questions occur more than once"):
        mme_task(tmp_path, image_folder)


# -- MMVP -------------------------------------------------------------------------------------
def test_options_are_read_and_paired_as_in_lmms_eval(golden):
    case = golden("mmvp.json")
    for row in case["extract"]:
        read = read_choice(row["text"], "", "lmms_eval")
        assert (read or "").upper() == row["letter"], row["text"]
    pairs = {}
    for doc, text in case["docs"]:
        label = doc["Correct Answer"].strip("()")
        read = read_choice(text, doc["Options"], "lmms_eval")
        pairs.setdefault((doc["Index"] + 1) // 2, []).append(read == label)
    outcomes = [right for pair in pairs.values() for right in pair]
    assert sum(outcomes) / len(outcomes) == case["accuracy"]
    assert sum(map(all, pairs.values())) / len(pairs) == case["pair_accuracy"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("A", "a"), ("(b)", "b"), ("**B**", "b"), ("a.", "a"), ("A. Open", "a"), ("(A) Open", "a"),
        ("The answer is B", "b"), ("Answer: (a)", "a"), ("The door is closed.", "b"),
        ("A dog is there", None), ("apple", None), ("Both A and B", None), ("(a) or (b)", None),
        ("Open or closed", None), ("", None), ("It is unopened", None),
    ],
)  # fmt: skip
def test_an_option_is_never_guessed(text, read):
    assert read_choice(text, "(a) Open (b) Closed") == read


@pytest.fixture
def mmvp_file(tmp_path):
    path = tmp_path / "Questions.csv"
    path.write_text(
        "Index,Question,Options,Correct Answer\n"
        '1,"Is it open, or not?",(a) Open (b) Closed,(a)\n'
        "2,Is it open?,(a) Open (b) Closed,(b)\n"
        "3,Left?,(a) Yes (b) No,(b)\n4,Left?,(a) Yes (b) No,(a)\n"
    )
    return path


def test_a_pair_counts_if_both_are_right_in_files_and_in_runs(mmvp_file, tmp_path):
    texts = {"1": "(a)", "2": "Closed", "3": "No", "4": "(b)"}
    answers = _write(tmp_path / "a.jsonl", [{"id": k, "answer": v} for k, v in texts.items()])
    result = score_mmvp(mmvp_file, answers, output=tmp_path / "out", n_resamples=5)
    expected = {"pair_accuracy": 0.5, "accuracy": 0.75, "unparsed": 0}
    assert {k: m["value"] for k, m in result["metrics"].items()} == expected
    task = mmvp_task(mmvp_file, tmp_path)
    assert task.items[0].prompt == "Is it open, or not? (a) Open (b) Closed"
    assert task.items[2].image.path == tmp_path / "3.jpg"
    assert _values(_evaluated(task, texts)) == expected
    _write(answers, [{"id": "1", "answer": "(a)"}])
    with pytest.raises(DataError, match="no answer for 3 of the 4 questions"):
        score_mmvp(mmvp_file, answers)


def test_a_malformed_question_file_is_named(mmvp_file):
    text = mmvp_file.read_text()
    mmvp_file.write_text(text.replace("(b)\n4,", "(c)\n4,"))
    with pytest.raises(DataError, match="row 4"):
        load_mmvp(mmvp_file)
    mmvp_file.write_text(text.rpartition("4,")[0])
    with pytest.raises(DataError, match="both of each pair"):
        load_mmvp(mmvp_file)
