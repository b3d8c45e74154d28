"""The commands: their results, and their exit codes when something is wrong."""

import json
import re
import subprocess
import sys

import pytest

from vlm_steer.cli import main


@pytest.fixture
def command(capsys):
    """Runs `vlm-steer ...`; returns the exit code, stdout and stderr."""

    def run(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def answer_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"question_id": i, "answer": "Yes." if i % 2 else "No."} for i in range(8, 0, -1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_help_is_instant_and_shows_an_example():
    for arguments in ("eval pope", "score chair", "score amber", "score mme", "demo"):
        script = (
            "import sys\nfrom vlm_steer.cli import main\n"
            f"try:\n    main({[*arguments.split(), '--help']!r})\n"
            "except SystemExit as stop:\n    assert not stop.code\n"
            "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'nltk', 'datasets'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f"Example: vlm-steer {arguments}" in " ".join(done.stdout.split())


def test_score_pope_joins_by_id_and_writes_scores(command, question_file, answer_file, tmp_path):
    output = tmp_path / "out"
    code, out, _ = command(
        "score", "pope", "--questions", question_file, "--answers", answer_file,
        "--parser", "official", "--output", output,
    )  # fmt: skip
    assert code == 0
    scores = json.loads((output / "scores.json").read_text())
    assert set(scores["metrics"]) >= {
        "accuracy", "precision", "recall", "f1", "yes_ratio", "TP", "FP", "TN", "FN",
    }  # fmt: skip
    for entry in scores["metrics"].values():
        assert set(entry) == {"value", "ci95"}
        assert entry["ci95"] is None or len(entry["ci95"]) == 2
    assert scores["metrics"]["accuracy"]["value"] == 1.0
    assert scores["metrics"]["TP"]["value"] == 4
    assert "parser sensitivity" in out
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["question_id"] == "1"
    assert samples[0]["parsed"] == "yes"


def test_undefined_metrics_are_null(command, question_file, tmp_path):
    answers = tmp_path / "silence.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": i, "text": "No"}) + "\n" for i in range(1, 9))
    )
    output = tmp_path / "out"
    command("score", "pope", "--questions", question_file, "--answers", answers, "--output", output)
    metrics = json.loads((output / "scores.json").read_text())["metrics"]
    assert metrics["precision"] == {"value": None, "ci95": None}
    assert metrics["f1"] == {"value": None, "ci95": None}
    assert metrics["accuracy"]["value"] == 0.5


def test_questions_without_an_answer_stop_the_scoring_or_are_left_out(
    command, question_file, answer_file, tmp_path
):
    lines = answer_file.read_text().splitlines()
    answer_file.write_text("\n".join(lines[2:]) + '\n{"question_id": 99, "text": "Yes"}\n')
    arguments = ["score", "pope", "--questions", question_file, "--answers", answer_file]
    code, _, err = command(*arguments, "--output", tmp_path / "out")
    assert code == 1
    assert "no answer for 2 of the 8 questions" in err
    assert "--missing exclude" in err
    assert not (tmp_path / "out").exists()
    code, _, err = command(*arguments, "--missing", "exclude", "--output", tmp_path / "out")
    assert code == 0
    assert "2 questions without an answer were left out" in err
    assert "1 answers belong to no question" in err


@pytest.mark.parametrize("wrong", ["duplicate", "missing"])
def test_bad_ids_exit_with_1_and_name_the_file(
    command, question_file, answer_file, tmp_path, wrong
):
    rows = [json.loads(line) for line in question_file.read_text().splitlines()]
    if wrong == "duplicate":
        rows[1]["question_id"] = 1
    else:
        del rows[1]["question_id"]
    question_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = command(
        "score", "pope", "--questions", question_file, "--answers", answer_file,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 1
    assert err.startswith("Error: ")
    assert "pope_random.jsonl" in err


@pytest.fixture
def caption_file(tmp_path):
    path = tmp_path / "captions.jsonl"
    rows = [
        {"image_id": 1, "caption": "A dog and a cat on two benches."},
        {"image_id": "COCO_val2014_000000000002.jpg", "caption": "Men in a bus."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objects = {"names": ["dog", "person", "bus"], "objects": {"1": [0], "2": [1, 2]}}
    (tmp_path / "objects.json").write_text(json.dumps(objects))
    return path


def test_score_chair_writes_scores_and_marks_mentions(command, caption_file, tmp_path):
    output = tmp_path / "out"
    code, out, _ = command(
        "score", "chair", "--captions", caption_file, "--objects", tmp_path / "objects.json",
        "--output", output,
    )  # fmt: skip
    assert code == 0
    metrics = json.loads((output / "scores.json").read_text())["metrics"]
    assert list(metrics) == ["CHAIRs", "CHAIRi", "Recall", "Precision", "F1", "Len", "n"]
    assert metrics["CHAIRs"]["value"] == 0.5
    assert metrics["CHAIRi"]["value"] == 2 / 5
    assert metrics["Recall"]["value"] == 1
    assert metrics["n"]["value"] == 2
    first = json.loads((output / "samples.jsonl").read_text().splitlines()[0])
    wrong = [m["surface"] for m in first["mentions"] if m["hallucinated"]]
    assert wrong == ["cat", "benches"]
    assert "CHAIRi" in out


def test_captions_of_unknown_images_are_never_scored_silently(command, caption_file, tmp_path):
    with caption_file.open("a") as file:
        file.write(json.dumps({"image_id": 77, "caption": "a dog"}) + "\n")
    arguments = [
        "score", "chair", "--captions", caption_file, "--objects", tmp_path / "objects.json",
        "--output", tmp_path / "out",
    ]  # fmt: skip
    code, _, err = command(*arguments)
    assert code == 1
    assert "1 of the 3 captioned images (77)" in err
    for policy, n in (("exclude", 2), ("empty", 3)):
        code, _, err = command(*arguments, "--unknown-images", policy)
        assert code == 0
        assert "1 images without ground truth" in err
        scores = json.loads((tmp_path / "out/scores.json").read_text())
        assert scores["metrics"]["n"]["value"] == n


def test_an_annotations_folder_without_the_needed_file_is_named(command, caption_file, tmp_path):
    (tmp_path / "coco").mkdir()
    code, _, err = command(
        "score", "chair", "--captions", caption_file, "--annotations", tmp_path / "coco",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 1
    assert "instances_val2014.json" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--normaliser", "opera", "--objects", "x"], "needs --synonyms"),
        ([], "either --objects FILE or --annotations DIR"),
        (["--normaliser", "pattern", "--objects", "x"], "pattern"),
    ],
)
def test_wrong_options_exit_with_2(command, caption_file, tmp_path, arguments, message):
    code, _, err = command(
        "score", "chair", "--captions", caption_file, *arguments, "--output", tmp_path / "out"
    )
    assert code == 2
    assert message in " ".join(err.split())


def test_eval_pope_on_local_files_writes_everything_and_continues(
    command, question_file, image_folder, tmp_path
):
    output = tmp_path / "out"
    arguments = [
        "eval", "pope", "--methods", "pai", "--questions", question_file, "--images", image_folder,
        "--max-new-tokens", 2, "--batch-size", 4, "--resamples", 200, "--output", output,
    ]  # fmt: skip
    code, out, _ = command(*arguments)
    assert code == 0
    assert {path.name for path in output.iterdir()} == {
        "generations.jsonl", "timings.jsonl", "run.json", "samples.jsonl", "counts.jsonl",
        "scores.json",
        "table.txt", "report.html",
    }  # fmt: skip
    scores = json.loads((output / "scores.json").read_text())
    assert set(scores["arms"]) == {"none", "pai"}
    assert set(scores["differences"]["pai"]["random"]["f1"]) >= {"value", "ci95", "p"}
    assert (output / "table.txt").read_text() in out
    log = (output / "generations.jsonl").read_bytes()
    assert command(*arguments)[0] == 0
    assert (output / "generations.jsonl").read_bytes() == log


def test_a_finished_run_is_scored_by_other_rules_and_labels_without_a_model(
    command, question_file, image_folder, tmp_path, monkeypatch
):
    first, second = tmp_path / "first", tmp_path / "second"
    data = ["--questions", question_file, "--images", image_folder, "--resamples", 50]
    generate = ["eval", "pope", *data, "--max-new-tokens", 2]
    trivial = "pai,trivial:min_new_tokens=2"
    assert command(*generate, "--methods", trivial, "--output", first)[0] == 0

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("vlm_steer.loading.load_model", refuse)
    rows = [json.loads(line) for line in question_file.read_text().splitlines()]
    flipped = [{**row, "label": "no" if row["label"] == "yes" else "yes"} for row in rows[1:]]
    question_file.write_text("".join(json.dumps(row) + "\n" for row in flipped))
    rescore = ["eval", "pope", *data, "--rescore", first, "--output", second]
    code, _, err = command(*rescore, "--parser", "official")
    assert code == 0, err
    before, after = (
        [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for folder in (first, second)
    )
    kept = [row for row in before if row["item"] != before[0]["item"]]
    assert [row["text"] for row in after] == [row["text"] for row in kept]
    assert all(a["label"] != b["label"] for a, b in zip(after, kept, strict=True))
    scores = json.loads((second / "scores.json").read_text())
    assert (scores["parser"], scores["n_items"]) == ("official", 7)
    assert list(scores["arms"]) == ["none", "pai", "trivial:min_new_tokens=2"]
    code, _, err = command(*rescore, "--suffix", " One word.")
    assert code == 1
    assert "no answer of the arm none to 7 of 7 items" in err
    assert command(*rescore, "--methods", "vcd")[0] == 2
    (image_folder / "scene_3.png").write_bytes((image_folder / "scene_2.png").read_bytes())
    assert command(*rescore)[0] == 1  # another picture is another question


def test_the_power_of_a_run_is_told_before_it(command):
    asked = ["eval", "power", "--disagreement", 0.05]
    code, out, _ = command(*asked, "--items", 3000)
    assert code == 0
    points = float(re.search(r"difference of ([\d.]+) points", out)[1])
    code, out, _ = command(*asked, "--difference", points / 100)
    assert int(out.split()[0]) == pytest.approx(3000, rel=0.1)
    assert "no difference" in command(*asked, "--items", 10)[1]
    for wrong in (
        [],
        ["--items", 5, "--difference", 0.01],
        ["--difference", 0.2],
        ["--difference", 0],
    ):
        assert command(*asked, *wrong)[0] == 2


def test_a_bad_image_exits_with_1_after_everything_else_is_scored(
    command, question_file, image_folder, tmp_path
):
    (image_folder / "scene_1.png").write_bytes(b"not an image")
    arguments = [
        "eval", "pope", "--questions", question_file, "--images", image_folder,
        "--max-new-tokens", 1, "--resamples", 20, "--output", tmp_path / "out",
    ]  # fmt: skip
    code, _, err = command(*arguments)
    assert code == 1
    assert "scene_1.png" in err
    assert "2 of 8 items" in err
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["n_items"] == 6
    assert command(*arguments, "--skip-bad-images")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pope", "--methods", "paj"], "Did you mean 'pai'"),
        (["pope", "--splits", "random,hard"], "--splits"),
        (["pope", "--suffix", " x"], "--suffix has no effect"),
        (["pope", "--questions", "q"], "needs --images"),
        (["pope", "--questions", "q", "--dataset", "d"], "one source of data"),
        (["pope", "--columns", "id=x"], "no effect without --dataset"),
        (["pope", "--temperature", "1", "--num-beams", "2"], "cannot be combined"),
        (["chair", "--synonyms", "s"], "s cannot be read"),
        (["chair", "--annotations", "a", "--objects", "b", "--images", "i"], "either"),
    ],
)
def test_wrong_options_of_eval_are_refused_before_a_model_is_loaded(
    command, tmp_path, monkeypatch, arguments, message
):
    import vlm_steer.loading

    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(vlm_steer.loading, "load_model", never)
    code, _, err = command("eval", *arguments, "--output", tmp_path / "out")
    assert code == (1 if "cannot be read" in message else 2)
    assert message in err


def test_results_of_a_run_are_replaced_by_none_but_its_own_and_then_said(
    command, question_file, image_folder, answer_file, tmp_path
):
    output = tmp_path / "run"
    data = ["--questions", question_file, "--images", image_folder, "--resamples", 10]
    run = ["eval", "pope", *data, "--output", output, "--max-new-tokens"]
    assert "replace" not in command(*run, 1)[2]
    held = {path.name: path.read_bytes() for path in output.iterdir()}
    score = ["score", "pope", "--questions", question_file, "--answers", answer_file]
    for other in (
        [*score, "--output", output],
        ["compare", output, "--output", output],
        ["eval", "pope", *data, "--rescore", output, "--parser", "official", "--output", output],
    ):
        code, _, err = command(*other)
        assert (code, "holds the results of a run" in err) == (2, True)
    assert held == {path.name: path.read_bytes() for path in output.iterdir()}
    code, _, err = command(*run, 2)
    assert (code, "held results of other settings" in err) == (0, True)
    code, _, err = command(*run, 1)
    assert (code, "held results of other settings" in err) == (0, True)
    assert (output / "scores.json").read_bytes() == held["scores.json"]
    assert len((output / "generations.jsonl").read_text().splitlines()) == 2 * 8


def test_the_questions_are_not_taken_for_answers(command, question_file, tmp_path):
    files = ["--questions", question_file, "--answers", question_file]
    code, _, err = command("score", "pope", *files, "--output", tmp_path / "out")
    assert (code, "holds the questions of" in err) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("benchmark", ["amber", "mme", "hallusionbench", "mmvp", "pope"])
def test_a_folder_of_images_that_is_none_is_told_before_anything_is_read(
    command, tmp_path, benchmark
):
    data = "--data" if benchmark == "amber" else "--questions"
    (tmp_path / "file").write_text("")
    for images, message in (("gone", "does not exist; check --images"), ("file", "is a file")):
        code, _, err = command(
            "eval", benchmark, data, tmp_path / "nothing", "--images", tmp_path / images,
            "--output", tmp_path / "out",
        )  # fmt: skip
        assert (code, message in err) == (1, True), err


def test_a_run_without_a_place_to_write_loads_no_model(
    command, question_file, image_folder, tmp_path, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vlm_steer.loading.load_model", never)
    run = ["eval", "pope", "--questions", question_file, "--images", image_folder, "--output"]
    code, _, err = command(*run, question_file)
    assert (code, "is a file. Give a folder" in err) == (2, True)
    code, _, err = command(*run, question_file / "out")
    assert (code, "cannot write to" in err) == (1, True)


def test_a_model_that_does_not_exist_exits_with_1(command, question_file, image_folder, tmp_path):
    code, _, err = command(
        "eval", "pope", "--model", tmp_path / "nothing", "--questions", question_file,
        "--images", image_folder, "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 1
    assert "nothing" in err


def test_demo_compares_steered_settings_and_reports_them(command, tmp_path):
    output = tmp_path / "demo"
    code, out, _ = command(
        "demo", "--methods", "var,vcd", "--scenes", "iid", "--pope-scenes", 1, "--chair-scenes", 1,
        "--output", output,
    )  # fmt: skip
    assert code == 0
    result = json.loads((output / "demo.json").read_text())
    assert set(result["chair"]["arms"]) == {"none", "var", "vcd"}
    assert set(result["pope"]["arms"]["none"]) == {"random", "popular", "adversarial", "all"}
    # The embedded model has no attention sinks, and that must be said.
    assert "var" in result["pope"]["changed_nothing"]
    assert "var: changed nothing" in out
    html = (output / "report.html").read_text()
    assert html.count("<svg") == 4
    assert "<img" in html


def test_score_mme_writes_points_and_says_what_is_absent(command, tmp_path):
    answers = tmp_path / "answers.jsonl"
    rows = [
        {"task": "count", "image": "1.jpg", "question": "?", "label": label, "answer": "yes"}
        for label in ("Yes", "No")
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    code, out, err = command("score", "mme", "--answers", answers, "--output", output)
    assert code == 0
    assert "accuracy" in out
    assert "without answers: existence" in err
    scores = json.loads((output / "scores.json").read_text())
    assert scores["categories"]["count"]["metrics"]["points"]["value"] == 50
    assert scores["metrics"]["perception"] == {"value": None, "ci95": None}
    units = [json.loads(line) for line in (output / "counts.jsonl").read_text().splitlines()]
    assert [unit["part"] for unit in units] == ["count"]
    code, _, err = command("score", "mme", "--answers", tmp_path / "no", "--output", output)
    assert code == 1
    assert err.startswith("Error: ")


def test_score_opope_and_beaf_write_scores(command, question_file, tmp_path):
    captions = tmp_path / "captions.jsonl"
    rows = [{"image": f"scene_{i}.png", "caption": "A car."} for i in range(4)]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "opope"
    code, out, _ = command(
        "score", "opope", "--captions", captions, "--questions", question_file,
        "--output", output,
    )  # fmt: skip
    assert code == 0
    assert "f_0.2" in out
    assert json.loads((output / "scores.json").read_text())["metrics"]["f1"]["value"] == 1
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        '{"id": 0, "image": "a.jpg", "question": "q", "gt": "yes", "orig_img": true, '
        '"removed_q": false}\n'
        '{"id": 1, "image": "a_00.jpg", "question": "q", "gt": "no", "orig_img": false, '
        '"removed_q": true}\n'
    )
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": 0, "answer": "Yes"}\n{"id": 1, "answer": "No"}\n')
    output = tmp_path / "beaf"
    code, _, _ = command(
        "score", "beaf", "--questions", pairs, "--answers", answers, "--output", output
    )
    assert code == 0
    assert json.loads((output / "scores.json").read_text())["metrics"]["TU"]["value"] == 1


def test_score_hallusionbench_and_amber_from_files(command, tmp_path):
    question = {
        "category": "VD", "subcategory": "map", "set_id": "0", "figure_id": "1",
        "question_id": "0",
    }  # fmt: skip
    questions, answers = tmp_path / "q.json", tmp_path / "a.jsonl"
    questions.write_text(json.dumps([question | {"visual_input": "2", "gt_answer": "1"}]))
    answers.write_text(json.dumps(question | {"model_prediction": "Yes."}) + "\n")
    output = tmp_path / "hallusion"
    code, _, err = command(
        "score", "hallusionbench", "--questions", questions, "--answers", answers,
        "--output", output,
    )  # fmt: skip
    assert code == 0
    assert "not comparable" in err
    assert json.loads((output / "scores.json").read_text())["metrics"]["fAcc"]["value"] == 1

    folder = tmp_path / "amber"
    folder.mkdir()
    (folder / "annotations.json").write_text(
        '[{"id": 1, "type": "discriminative-hallucination", "truth": "no"}]'
    )
    (folder / "relation.json").write_text("{}")
    (folder / "safe_words.txt").write_text("")
    answers.write_text('{"id": 1, "response": "No"}\n')
    output = tmp_path / "out"
    code, _, err = command(
        "score", "amber", "--data", folder, "--answers", answers, "--output", output
    )
    assert code == 0
    assert "intervals are too narrow" in " ".join(err.split())
    assert json.loads((output / "scores.json").read_text())["official"]["existence"]["F1"] == 99.9
