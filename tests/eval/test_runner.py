"""Runs that can be killed, continued and repeated."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from PIL import Image

from vlm_steer.errors import ConfigError, DataError, SteerError
from vlm_steer.generation import encode, render_prompt
from vlm_steer.loading import load_model
from vlm_steer.tiny import model_dir
from vlm_steer_eval.running.arms import is_trivial, parse_arms, trivial_arms
from vlm_steer_eval.running.fingerprint import model_fingerprint
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.images import NoImage
from vlm_steer_eval.running.parts import LOG_NAME
from vlm_steer_eval.running.results import evaluate, sample_rows, score_all
from vlm_steer_eval.running.runner import run_arms
from vlm_steer_eval.running.sources import local_pope

SETTINGS = Settings(max_new_tokens=2)


def _task(question_file, image_folder):
    return local_pope([question_file], image_folder)


def _run(tiny, task, output, methods="none", batch_size=3, settings=SETTINGS):
    return run_arms(
        task,
        parse_arms(methods),
        *tiny,
        model_name="tiny",
        settings=settings,
        batch_size=batch_size,
        output=output,
    )


def _texts(run):
    return {arm: {i: r["text"] for i, r in rows.items()} for arm, rows in run.records.items()}


@pytest.fixture
def counting(tiny, monkeypatch):
    """The model, and a list of the batch sizes it was asked for."""
    model, processor = tiny
    generate, sizes = model.generate, []

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", counted, raising=False)
    return (model, processor), sizes


def test_arms_are_parsed_with_the_unsteered_one_first():
    assert [arm.name for arm in parse_arms("pai+vcd,none,pai")] == ["none", "pai+vcd", "pai"]
    assert [m.name for m in parse_arms("pai+vcd")[1].methods] == ["pai", "vcd"]
    for wrong in ("pai,pai", "pai,,vcd", "pa"):
        with pytest.raises(ConfigError):
            parse_arms(wrong)


def test_a_trivial_baseline_is_the_unsteered_model_decoded_otherwise(
    tiny, question_file, image_folder, tmp_path
):
    task, settings = _task(question_file, image_folder), Settings(max_new_tokens=4)
    names = ("none", "trivial:end_bias=50", "trivial:min_new_tokens=4", "trivial:num_beams=2")
    run = _run(tiny, task, tmp_path, ",".join(names), settings=settings)
    lengths = {arm: {r["tokens"] for r in rows.values()} for arm, rows in run.records.items()}
    assert (lengths[names[1]], lengths[names[2]]) == ({1}, {4})
    assert run.provenance["decoding"][names[3]] == {"num_beams": 2}
    assert evaluate(task, run, score_all(task, run), n_resamples=10)["changed_nothing"] == []
    # An arm is known by how it decodes, not by its name.
    alone = dataclasses.replace(settings, num_beams=2)
    again = _run(tiny, task, tmp_path, settings=alone)
    assert again.n_generated == 0
    assert _texts(again)["none"] == _texts(run)[names[3]]


def test_a_deterministic_run_takes_single_items_and_reuses_no_others(
    counting, question_file, image_folder, tmp_path
):
    tiny, sizes = counting
    task, strict = (
        _task(question_file, image_folder),
        Settings(max_new_tokens=2, deterministic=True),
    )
    _run(tiny, task, tmp_path)
    first = _run(tiny, task, tmp_path, settings=strict)
    assert sizes == [3, 3, 2] + [1] * 8
    assert not torch.are_deterministic_algorithms_enabled()
    again = _run(tiny, task, tmp_path / "other", settings=strict)
    assert _texts(again) == _texts(first)
    assert [r["margin"] for r in again.records["none"].values()] == [
        r["margin"] for r in first.records["none"].values()
    ]


def test_trivial_baselines_that_cannot_be_are_refused():
    for wrong in ("trivial:", "trivial:beams=5", "trivial:num_beams=x", "trivial:num_beams"):
        with pytest.raises(ConfigError, match="SETTING=VALUE"):
            parse_arms(wrong)
    (_, arm) = parse_arms("trivial:temperature=1")
    with pytest.raises(ConfigError, match=r"trivial:temperature=1: --temperature"):
        arm.settings(Settings(num_beams=5))
    for settings in (Settings(), Settings(num_beams=5), Settings(temperature=0.5)):
        arms = trivial_arms(settings)
        assert all(is_trivial(a.name) and is_trivial(f"run/{a.name}") for a in arms)
        assert settings not in [a.settings(settings) for a in arms]


def test_a_finished_run_is_not_generated_again(counting, question_file, image_folder, tmp_path):
    tiny, sizes = counting
    task = _task(question_file, image_folder)
    first = _run(tiny, task, tmp_path / "out")
    assert first.n_generated == 8
    assert sizes == [3, 3, 2]
    again = _run(tiny, task, tmp_path / "out")
    assert again.n_generated == 0
    assert sizes == [3, 3, 2]
    assert _texts(again) == _texts(first)


def test_what_an_answer_depends_on_is_in_its_key(counting, question_file, image_folder, tmp_path):
    tiny, _ = counting
    task, output = _task(question_file, image_folder), tmp_path / "out"
    _run(tiny, task, output)
    assert _run(tiny, task, output, settings=Settings(max_new_tokens=3)).n_generated == 8
    assert _run(tiny, task, output, methods={"a": {"method": "pai", "alpha": 0.2}}).n_generated == 8
    assert _run(tiny, task, output, methods={"b": {"method": "pai", "alpha": 0.2}}).n_generated == 0
    assert _run(tiny, task, output, methods={"b": {"method": "pai", "alpha": 0.3}}).n_generated == 8
    Image.new("RGB", (96, 96)).save(image_folder / "scene_0.png")
    assert _run(tiny, task, output).n_generated == 2
    with torch.no_grad():
        weight = next(tiny[0].parameters())
        kept = weight.clone()
        weight.add_(1e-3)
        try:
            assert _run(tiny, task, output).n_generated == 8
        finally:
            weight.copy_(kept)


def test_questions_without_an_image_are_asked_without_one(
    counting, question_file, image_folder, tmp_path
):
    (model, processor), sizes = counting
    task = _task(question_file, image_folder)
    blind = [
        dataclasses.replace(item, id=f"blind {item.id}", image=NoImage()) for item in task.items[:2]
    ]
    task = dataclasses.replace(task, items=[blind[0], *task.items, blind[1]])
    run = _run((model, processor), task, tmp_path, methods="none,pai")
    assert sizes == 2 * [3, 3, 2, 2]  # they share no batch with the others
    prompt = render_prompt(processor, blind[0].prompt, n_images=0)
    inputs = encode(processor, [prompt], None)
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    for records in run.records.values():
        assert records[blind[0].id]["text"] == said.strip()
        assert records[blind[0].id]["prompt"] == prompt
        assert processor.image_token not in prompt
    row = sample_rows(task, run, score_all(task, run))[0]
    assert (row["item"], row["image"]) == (blind[0].id, "")


def test_a_torn_log_continues_to_the_same_answers(counting, question_file, image_folder, tmp_path):
    tiny, sizes = counting
    task, output = _task(question_file, image_folder), tmp_path / "out"
    whole = _run(tiny, task, output)
    log = output / LOG_NAME
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    sizes.clear()
    continued = _run(tiny, task, output)
    # The torn batch is generated as a whole, and only what was missing is added.
    assert sizes == [3, 2]
    assert continued.n_generated == 4
    assert _texts(continued) == _texts(whole)
    assert len(log.read_text().splitlines()) == 8


def test_a_killed_run_continues_where_it_stopped(tiny, question_file, image_folder, tmp_path):
    output = tmp_path / "out"
    script = f"""
import time
from pathlib import Path
import torch
torch.set_num_threads(1)
from vlm_steer import load_tiny
from vlm_steer_eval.running.arms import parse_arms
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.runner import run_arms
from vlm_steer_eval.running.sources import local_pope
model, processor = load_tiny()
generate = model.generate
def slow(**inputs):
    if Path({str(output / LOG_NAME)!r}).stat().st_size:
        time.sleep(600)
    return generate(**inputs)
model.generate = slow
task = local_pope([Path({str(question_file)!r})], Path({str(image_folder)!r}))
run_arms(task, parse_arms("none"), model, processor, model_name="tiny",
         settings=Settings(max_new_tokens=2), batch_size=3, output=Path({str(output)!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    log = output / LOG_NAME
    deadline = time.monotonic() + 240
    while not (log.exists() and log.stat().st_size):
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    assert len(log.read_text().splitlines()) == 3
    continued = _run(tiny, _task(question_file, image_folder), output)
    assert continued.n_generated == 5
    fresh = _run(tiny, _task(question_file, image_folder), tmp_path / "fresh")
    assert _texts(continued) == _texts(fresh)


def test_a_full_disk_keeps_what_was_finished(
    counting, question_file, image_folder, tmp_path, monkeypatch
):
    tiny, _ = counting
    task, output = _task(question_file, image_folder), tmp_path / "out"
    from vlm_steer_eval.running import genlog

    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) > 1:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(genlog, "os", types.SimpleNamespace(fsync=full))
        with pytest.raises(DataError, match=r"disk is full.*generations\.jsonl.*free"):
            _run(tiny, task, output)
    assert len((output / LOG_NAME).read_text().splitlines()) >= 3
    assert len(_run(tiny, task, output).records["none"]) == 8


def test_running_out_of_memory_halves_the_batch_and_loses_nothing(
    tiny, question_file, image_folder, tmp_path, monkeypatch
):
    model, processor = tiny
    generate, tried = model.generate, []

    def cramped(**inputs):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return generate(**inputs)

    task = _task(question_file, image_folder)
    expected = _texts(_run(tiny, task, tmp_path / "roomy"))
    monkeypatch.setattr(model, "generate", cramped, raising=False)
    run = _run((model, processor), task, tmp_path / "cramped", batch_size=8)
    assert tried == [8, 4, 2, 2, 2, 2]
    assert _texts(run) == expected
    assert any("--batch-size 2" in note for note in run.notes["none"])


def test_no_memory_for_a_single_answer_says_what_to_lower(
    tiny, question_file, image_folder, tmp_path, monkeypatch
):
    def never(**inputs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tiny[0], "generate", never, raising=False)
    with pytest.raises(SteerError, match="--max-new-tokens"):
        _run(tiny, _task(question_file, image_folder), tmp_path / "out")


@pytest.mark.parametrize("damage", ["missing", "truncated", "not an image"])
def test_a_bad_image_is_named_left_out_and_added_once_repaired(
    tiny, question_file, image_folder, tmp_path, damage
):
    path = image_folder / "scene_2.png"
    good = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    else:
        path.write_text("a web page saying 404")
    task, output = _task(question_file, image_folder), tmp_path / "out"
    run = _run(tiny, task, output)
    assert [failure["item"] for failure in run.failures] == ["random/5", "random/6"]
    assert all("scene_2.png" in failure["error"] for failure in run.failures)
    summary = evaluate(task, run, score_all(task, run), n_resamples=10)
    assert summary["n_items"] == 6
    assert len(summary["excluded"]) == 2
    path.write_bytes(good)
    repaired = _run(tiny, task, output)
    assert not repaired.failures
    assert len(repaired.records["none"]) == 8
    assert _texts(repaired) == _texts(_run(tiny, task, tmp_path / "fresh"))


def test_a_run_without_any_usable_image_is_an_error(tiny, question_file, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"none of the 8 items.*scene_0\.png does not exist"):
        _run(tiny, local_pope([question_file], tmp_path / "empty"), tmp_path / "out")


def test_samples_hold_everything_needed_to_check_a_score(
    tiny, question_file, image_folder, tmp_path
):
    task = _task(question_file, image_folder)
    run = _run(tiny, task, tmp_path / "out", methods="pai")
    rows = sample_rows(task, run, score_all(task, run))
    assert len(rows) == 16
    for row in rows:
        assert row["prompt"].startswith("USER: <image>")
        assert row["parsed"] in ("yes", "no", None)
        assert row["seed"] is None
        assert len(row["layout"]) == 12
        assert isinstance(row["margin"], float)
        assert isinstance(row["truncated"], bool)
    provenance = json.loads((tmp_path / "out" / "run.json").read_text())
    assert provenance["methods"]["pai"]["methods"][0]["method"] == "pai"
    assert provenance["model"]["name"] == "tiny"
    timings = (tmp_path / "out" / "timings.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in timings]
    assert sum(row["answers"] for row in rows) == 16
    # Without beams and branches one row per answer and token passes the decoder.
    plain = [row for row in rows if row["arm"] == "none"]
    assert all(row["answers"] <= row["passes"] for row in plain)
    assert sum(row["passes"] for row in plain) >= sum(row["tokens"] for row in plain)
    assert {row["memory"] for row in rows} == {None}


def test_another_benchmark_does_not_overwrite_a_run(tiny, question_file, image_folder, tmp_path):
    task = _task(question_file, image_folder)
    _run(tiny, task, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds a run of pope"):
        _run(tiny, dataclasses.replace(task, name="chair"), tmp_path / "out")


def test_fingerprint_does_not_change_with_the_place_of_the_files(tiny, tmp_path):
    shutil.copytree(model_dir(), tmp_path / "moved")
    moved, _ = load_model(str(tmp_path / "moved"))
    assert model_fingerprint(moved, "tiny") == model_fingerprint(tiny[0], "tiny")


def test_fingerprint_changes_with_the_weights_and_not_with_the_run(tiny):
    model, _ = tiny
    before = model_fingerprint(model, "tiny")
    assert before == model_fingerprint(model, "tiny")
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        kept = weight[0, 0].clone()
        weight[0, 0] += 1
        assert model_fingerprint(model, "tiny")["content"] != before["content"]
        weight[0, 0] = kept
    assert model_fingerprint(model, "tiny") == before
