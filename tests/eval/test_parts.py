"""Logs on a file system that cannot append: immutable parts, and the results of a folder."""

import json
import uuid
from pathlib import Path

import fsspec
import pytest

from vlm_steer.cli import main
from vlm_steer.errors import DataError
from vlm_steer_eval.running.arms import parse_arms
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.parts import RemoteLogs, remote_url
from vlm_steer_eval.running.runner import run_arms
from vlm_steer_eval.running.sources import local_pope
from vlm_steer_eval.running.workers import Workers

RESULTS = ("scores.json", "samples.jsonl", "counts.jsonl", "table.txt", "run.json")


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """The address of a run that nobody else uses."""
    if request.param == "file":
        return f"file://{tmp_path / 'remote'}"
    return f"memory://{uuid.uuid4().hex}/run"


def _read(url, name):
    with fsspec.open(f"{url}/{name}", "rb") as file:
        return file.read()


def test_addresses_survive_being_paths():
    assert remote_url(Path("s3://bucket/run")) == "s3://bucket/run"
    assert remote_url(Path("memory://run")) == "memory://run"
    assert remote_url(Path("file:///tmp/run")) == "file:///tmp/run"
    assert remote_url(Path("runs/pope")) is None
    assert remote_url(Path("/abs/pope:2")) is None


def test_parts_are_numbered_immutable_and_read_in_order(url):
    logs = RemoteLogs(url)
    with logs.open(Workers(1, 2)) as second, logs.open(Workers(0, 2)) as first:
        second.append([{"key": "b", "n": 1}])
        first.append([{"key": "a", "n": 1}])
        first.append([{"key": "c", "n": 1}])
    assert logs.names() == [
        f"parts/{name}.jsonl" for name in ("000-000000", "000-000001", "001-000000")
    ]
    assert list(logs.read()) == ["a", "c", "b"]
    with logs.open(Workers(0, 1)) as again:
        assert set(again.records) == {"a", "b", "c"}
        again.append([{"key": "d", "n": 1}])
    assert "parts/000-000002.jsonl" in logs.names()
    with pytest.raises(DataError, match="another run"):
        logs.create("parts/000-000002.jsonl", b"")
    logs.merge()
    merged = [json.loads(line)["key"] for line in _read(url, "generations.jsonl").splitlines()]
    assert merged == ["a", "c", "d", "b"]


def test_a_torn_part_counts_as_far_as_it_is_whole(url):
    logs = RemoteLogs(url)
    logs.create("parts/000-000000.jsonl", b'{"key": "a"}\n{"key": "b"')
    assert list(logs.read()) == ["a"]
    logs.create("parts/000-000001.jsonl", b"{broken\n")
    with pytest.raises(DataError, match=r"000-000001.jsonl, line 1 is damaged"):
        logs.read()


def test_an_unknown_file_system_is_refused():
    with pytest.raises(DataError, match="fsspec"):
        RemoteLogs("nowhere://bucket/run")


def _main(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def _eval(question_file, image_folder, output, capsys, *more):
    code = _main(
        "eval", "pope", "--questions", question_file, "--images", image_folder,
        "--max-new-tokens", "2", "--batch-size", "4", "--resamples", "20",
        "--output", output, *more,
    )  # fmt: skip
    assert not code, capsys.readouterr().err


def test_results_at_an_address_are_those_of_a_folder(
    url, question_file, image_folder, tmp_path, capsys
):
    _eval(question_file, image_folder, tmp_path / "local", capsys)
    _eval(question_file, image_folder, url, capsys)
    assert f"results: {url}" in capsys.readouterr().out
    for name in (*RESULTS, "generations.jsonl"):
        assert _read(url, name) == (tmp_path / "local" / name).read_bytes(), name
    parts = RemoteLogs(url).names()
    assert len(parts) == 2
    _eval(question_file, image_folder, url, capsys)
    assert RemoteLogs(url).names() == parts  # nothing is generated twice
    _eval(question_file, image_folder, url, capsys, "--repeat", "1")
    assert json.loads(_read(url, "repeat.json"))["batch_size"] == 4
    assert len(_read(url, "repeat/1/generations.jsonl").splitlines()) == 8
    # Runs are compared wherever they lie.
    output = tmp_path / "compared"
    arguments = ("compare", url, tmp_path / "local", "--resamples", "20", "--output", output)
    assert not _main(*arguments), capsys.readouterr().err
    found = json.loads((output / "compare.json").read_text())
    names = [f"{url.rpartition('/')[2]}/none", "local/none"]
    assert list(found["arms"]) == list(found["cost"]) == names
    assert found["arms"][names[0]] == found["arms"][names[1]]
    assert _main("compare", url, tmp_path / "local", "--output", f"{url}/compared") == 2
    assert "give one, and copy it" in capsys.readouterr().err
    judged = (
        "--questions",
        question_file,
        "--images",
        image_folder,
        "--judge",
        "endpoint:m@http://x",
    )
    assert _main("eval", "hallusionbench", *judged, "--output", url) == 2
    assert "--judge keeps replies" in capsys.readouterr().err
    assert _main("compare", f"{url}/nothing", url, "--output", output) == 1
    assert f"{url}/nothing holds no scores.json" in capsys.readouterr().err


def test_processes_share_an_address_and_a_lost_one_is_made_up_for(
    tiny, question_file, image_folder, tmp_path
):
    logs = RemoteLogs(f"memory://{uuid.uuid4().hex}")

    def run(name, workers, store=None):
        return run_arms(
            local_pope([question_file], image_folder), parse_arms("none"), *tiny,
            model_name="tiny", settings=Settings(max_new_tokens=2), batch_size=2,
            output=tmp_path / name, workers=workers, logs=store,
        )  # fmt: skip

    alone = run("alone", Workers())
    with pytest.raises(DataError, match="run the same command again"):
        run("second", Workers(1, 2), logs)  # the first process never ran
    found = run("first", Workers(), logs)
    assert found.n_generated == 4
    assert found.records == alone.records
