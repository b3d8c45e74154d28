"""Answers again at other batch sizes."""

import json

import pytest
from typer.testing import CliRunner

from vlm_steer.cli import build_app
from vlm_steer.errors import ConfigError
from vlm_steer_eval.benchmarks.tasks import Scored
from vlm_steer_eval.running.arms import parse_arms
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.repeat import parse_sizes, repeat_lines, repeat_run
from vlm_steer_eval.running.runner import run_arms
from vlm_steer_eval.running.sources import local_pope


def test_sizes_are_different_whole_numbers_other_than_the_run_s():
    assert parse_sizes("1, 4", 16) == [1, 4]
    for wrong in ("16", "1,1", "0", "1,x", "", "-1", "1,"):
        with pytest.raises(ConfigError, match="--repeat"):
            parse_sizes(wrong, 16)


def test_changed_answers_are_counted_and_so_are_changed_scores(
    tiny, question_file, image_folder, tmp_path
):
    task, arms = local_pope([question_file], image_folder), parse_arms("none")
    common = {
        "model_name": "tiny",
        "settings": Settings(max_new_tokens=2),
        "batch_size": 8,
        "output": tmp_path,
    }
    first = run_arms(task, arms, *tiny, **common)
    same = repeat_run(task, arms, *tiny, first, [3], **common)["arms"]["none"]["3"]
    assert (same["n"], same["texts"], same["scores"], same["ci95"][0]) == (8, 0, 0, 0.0)
    one, *_ = (record["text"] for record in first.records["none"].values())
    records = first.records["none"]
    for index, (item, record) in enumerate(records.items()):
        if index < 2:  # once other words of the same meaning, once the other answer
            other = "No" if record["text"].lower().startswith("yes") else "Yes"
            text = (one + ".", other)[index]
            records[item] = {**record, "text": text}
    report = repeat_run(task, arms, *tiny, first, [3], **common)
    changed = report["arms"]["none"]["3"]
    assert (changed["texts"], changed["scores"], changed["flip_rate"]) == (2, 1, 0.25)
    assert repeat_lines(report)[0].startswith(
        "none at batch size 3: 2 of 8 answers differ from those at 8 (25.0 % ["
    )


def test_scores_change_where_answers_count_in_groups_only():
    one, other = (Scored((), {"label": "yes", "parsed": said}) for said in ("yes", "no"))
    assert one.outcome != other.outcome
    assert one.outcome == Scored((), {"parsed": "yes", "text": "Yes!"}).outcome


def test_the_command_says_how_many_answers_changed(tmp_path):
    arguments = ["eval", "pope", "--limit", "1", "--splits", "random", "--resamples", "50"]
    folder = tmp_path / "out"
    arguments += ["--max-new-tokens", "2"]
    result = CliRunner().invoke(build_app(), [*arguments, "--repeat", "1", "--output", str(folder)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "none at batch size 1: 0 of 6 answers differ from those at 16" in result.stdout
    assert json.loads((folder / "repeat.json").read_text())["batch_size"] == 16
    wrong = CliRunner().invoke(build_app(), [*arguments, "--repeat", "x", "--output", str(folder)])
    assert isinstance(wrong.exception, ConfigError)
