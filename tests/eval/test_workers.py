"""Any number of processes gives the results of one."""

import os
import subprocess
import sys

import pytest

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.running.arms import parse_arms
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.pipeline import run_benchmark
from vlm_steer_eval.running.runner import run_arms
from vlm_steer_eval.running.sources import local_pope
from vlm_steer_eval.running.workers import Workers, workers_from_environment

RESULTS = ("samples.jsonl", "counts.jsonl", "scores.json", "table.txt", "run.json")


@pytest.fixture
def run(tiny, question_file, image_folder, tmp_path):
    """Runs one process of a benchmark; process 0 writes the results."""
    task = local_pope([question_file], image_folder)

    def start(name, workers):
        options = {
            "model_name": "tiny",
            "settings": Settings(max_new_tokens=2),
            "batch_size": 2,
            "output": tmp_path / name,
            "workers": workers,
        }
        if workers.is_main:
            return run_benchmark(task, "none,spin", *tiny, n_resamples=50, **options).run
        return run_arms(task, parse_arms("none,spin"), *tiny, **options)

    return start


def _results(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


def test_one_two_and_three_processes_write_the_same_results(run, tmp_path):
    run("one", Workers())
    for size in (2, 3):
        shares = []
        # Process 0 comes last and finds what the others have logged.
        for rank in range(size - 1, -1, -1):
            if rank:
                with pytest.raises(DataError, match="answers are missing"):
                    run(str(size), Workers(rank, size))
                log = tmp_path / str(size) / f"generations-{rank:03d}.jsonl"
                shares.append(len(log.read_text().splitlines()))
            else:
                run(str(size), Workers(0, size))
        shares.append(len((tmp_path / str(size) / "generations.jsonl").read_text().splitlines()))
        assert sum(shares) == 16
        assert 0 < min(shares) < 16
        assert _results(tmp_path / str(size)) == _results(tmp_path / "one")


def test_what_a_lost_process_had_to_do_is_done_by_the_next_run(run, tmp_path):
    run("one", Workers())
    with pytest.raises(DataError, match="run the same command again"):
        run("lost", Workers(1, 3))
    log = tmp_path / "lost/generations-001.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]) + lines[-1][:10])  # killed while writing
    found = run("lost", Workers())
    # The batch of two that was torn is generated again as a whole, one of it is in the log.
    assert found.n_generated == 16 - (len(lines) - 1)
    assert _results(tmp_path / "lost") == _results(tmp_path / "one")


def test_a_process_alone_is_the_main_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    workers = workers_from_environment()
    assert workers.is_main
    assert workers.part("log.jsonl") == "log.jsonl"
    assert Workers(2, 3).part("log.jsonl") == "log-002.jsonl"
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="accelerate launch"):
        workers_from_environment()


def test_two_launched_processes_write_what_one_writes(question_file, image_folder, tmp_path):
    command = [
        "vlm_steer", "eval", "pope", "--questions", str(question_file), "--images",
        str(image_folder), "--max-new-tokens", "2", "--batch-size", "2", "--resamples", "50",
    ]  # fmt: skip
    # Where there are GPUs, accelerate launch is this launcher with a choice of devices.
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, start in (("one", []), ("two", launch)):
        arguments = [*start, *command, "--output", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            capture_output=True, text=True, check=False, env=environment, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two/generations-001.jsonl").stat().st_size
    assert _results(tmp_path / "two") == _results(tmp_path / "one")
