"""Reading what users give, and writing so that nothing is lost."""

import gzip
import json
from pathlib import Path

import pytest

from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.questions import load_answers, load_questions
from vlm_steer_eval.files import image_key, read_rows, write_json, write_rows
from vlm_steer_eval.running.genlog import GenerationLog, content_key

QUESTION = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "yes"}


def _write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("COCO_val2014_000000000042.jpg", "42"),
        ("images/000000000042.jpg", "42"),
        (42, "42"),
        ("42", "42"),
        ("cat_dog.jpeg", "cat_dog.jpeg"),
        ("2405722.jpg", "2405722"),
        ("waterview.jpg", "waterview.jpg"),
        ("v1.5", "v1.5"),
    ],
)
def test_an_image_has_one_key_however_it_is_spelt(value, key):
    assert image_key(value) == key


def test_rows_come_from_lines_arrays_and_gzip_alike(tmp_path):
    rows = [{"a": 1}, {"a": 2}]
    _write(tmp_path / "lines.jsonl", *rows)
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    for name in ("lines.jsonl", "array.json", "lines.jsonl.gz"):
        assert read_rows(tmp_path / name) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"a": 1}\n{"a": ', "line 2"),
        ("[1, 2]", "row 1"),
        ('[{"a": 1}', "not valid JSON"),
    ],
)
def test_malformed_files_are_refused_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_rows(path)
    assert "rows.jsonl" in str(error.value)


def test_a_truncated_gzip_file_is_refused(tmp_path):
    path = tmp_path / "objects.json.gz"
    path.write_bytes(gzip.compress(b"[" * 1000)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(path)


@pytest.mark.parametrize("label", ["maybe", None])
def test_a_question_needs_a_label(tmp_path, label):
    with pytest.raises(DataError, match="yes or no"):
        load_questions(_write(tmp_path / "q.jsonl", {**QUESTION, "label": label}))


def test_duplicate_question_ids_are_refused_by_name(tmp_path):
    path = _write(tmp_path / "q.jsonl", QUESTION, {**QUESTION, "text": "Is there a cat?"})
    with pytest.raises(DataError, match=r"more than once \(1\).*number them anew"):
        load_questions(path)
    path = _write(
        tmp_path / "a.jsonl", {"question_id": 7, "text": "x"}, {"question_id": "7", "answer": "y"}
    )
    with pytest.raises(DataError, match=r"more than once \(7\)"):
        load_answers(path)


def test_missing_question_ids_are_refused_by_row(tmp_path):
    rows = [QUESTION, {key: QUESTION[key] for key in ("image", "text", "label")}]
    with pytest.raises(DataError, match=r"row 2: question_id is missing.*never by line"):
        load_questions(_write(tmp_path / "q.jsonl", *rows))
    with pytest.raises(DataError, match="row 1: question_id"):
        load_answers(_write(tmp_path / "a.jsonl", {"question": "Is there?", "answer": "Yes"}))


def test_a_multi_turn_file_is_recognised(tmp_path):
    with pytest.raises(DataError, match="multi-turn"):
        load_questions(_write(tmp_path / "q.jsonl", {**QUESTION, "text": ["a", "b"]}))


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "scores.json"
    write_json(path, {"value": 1})

    def rows():
        yield {"value": 2}
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"disk is full.*scores\.json.*run the same command again"):
        write_rows(path, rows())
    assert json.loads(path.read_text()) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_json(tmp_path / "file" / "scores.json", {})


def test_a_log_remembers_what_was_appended(tmp_path):
    with GenerationLog(tmp_path / "log.jsonl") as log:
        log.append([{"key": "a", "text": "näh"}, {"key": "b", "text": "y"}])
    with GenerationLog(tmp_path / "log.jsonl") as log:
        assert log.records == {
            "a": {"key": "a", "text": "näh"},
            "b": {"key": "b", "text": "y"},
        }
        assert not log.repaired


def test_a_torn_last_line_is_cut_off_and_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    with GenerationLog(path) as log:
        log.append([{"key": "a"}, {"key": "b"}])
    whole = path.read_bytes()
    for cut in range(1, len(b'{"key": "b"}\n') + 1):
        path.write_bytes(whole[:-cut])
        with GenerationLog(path) as log:
            assert list(log.records) == ["a"]
            log.append([{"key": "b"}])
        assert path.read_bytes() == whole


def test_damage_in_the_middle_of_a_log_is_named_not_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"key": "a"}\n{"key": \n{"key": "c"}\n')
    with pytest.raises(DataError, match=r"line 2 is damaged"), GenerationLog(path):
        pass


def test_two_runs_cannot_write_one_log(tmp_path):
    path = tmp_path / "log.jsonl"
    with (
        GenerationLog(path),
        pytest.raises(DataError, match="another run"),
        GenerationLog(path),
    ):
        pass


def test_a_full_disk_tears_at_most_the_last_line_of_a_log(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    with GenerationLog(path) as log:
        log.append([{"key": "a"}])
        file = log._file

        class Full:
            def write(self, data):
                if len(data) < 20:
                    raise OSError(28, "No space left on device")
                return file.write(data[: len(data) // 2])

        monkeypatch.setattr(log, "_file", Full())
        with pytest.raises(DataError, match=r"disk is full.*run the same command again"):
            log.append([{"key": "b", "text": "a text of some length"}])
        assert list(log.records) == ["a"]
        monkeypatch.undo()
    assert not path.read_bytes().endswith(b"\n")
    with GenerationLog(path) as log:
        assert list(log.records) == ["a"]


def test_keys_depend_on_content_and_not_on_order():
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
