"""Run the arms of a benchmark: generate what is not logged yet, and log it at once."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types

import vlm_steer
from vlm_steer.engine.steer import Steering
from vlm_steer.errors import ConfigError, DataError, SteerWarning
from vlm_steer.generation import halving, render_prompt
from vlm_steer_eval.benchmarks.tasks import Item, Task
from vlm_steer_eval.files import read_json, reporting_write_errors, write_json

from .arms import Arm
from .fingerprint import model_fingerprint, versions
from .generation import Generator, Output, Settings, item_seed
from .genlog import content_key
from .images import ImageError
from .measuring import Measured, measured
from .parts import LocalLogs, Log, Logs
from .workers import Workers

__all__ = ["RUN_NAME", "RunResult", "answer_key", "check_images", "run_arms"]

RUN_NAME = "run.json"
TIMINGS_NAME = "timings.jsonl"


@dataclass
class RunResult:
    """What a run has produced.

    Attributes:
        records: arm -> item id -> log record.
        failures: items left out of every arm, with the reason.
        notes: arm -> what the steering had to say, such as that it changed nothing.
        n_generated: answers generated now, rather than found in the log.
        provenance: model, settings, versions and resolved configurations.
    """

    records: dict[str, dict[str, dict[str, Any]]]
    failures: list[dict[str, str]]
    notes: dict[str, list[str]] = field(default_factory=dict)
    n_generated: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)


def run_arms(
    task: Task,
    arms: Sequence[Arm],
    model: Any,
    processor: Any,
    *,
    model_name: str,
    settings: Settings,
    batch_size: int,
    output: Path,
    share_prefix: bool = False,
    workers: Workers | None = None,
    logs: Logs | None = None,
) -> RunResult:
    """Generate every arm's answers to every item, continuing an earlier run in the same folder.

    An answer is taken from the log when everything it depends on is equal: the model, the resolved
    methods, the prompt, the image's bytes, the settings and the library versions. A batch is always
    generated as a whole, so that continuing a run gives what an uninterrupted run would have given.

    Args:
        task: the benchmark.
        arms: what to compare, from `parse_arms`.
        model: an image-text-to-text model.
        processor: its processor.
        model_name: what the user calls the model.
        settings: how to generate.
        batch_size: items per batch, > 0; halved when memory runs out.
        output: folder of the log.
        share_prefix: compute what questions about one image have in common once per batch, for
            arms that allow it. Such an arm is tried on one batch first, and generates from whole
            prompts if the answers differ.
        workers: this process among those that share the run; alone by default. Batches are the
            same for any number of processes and go to them in turn, and every process has a log of
            its own. What another process lost or has not begun is found out by the next run.
        logs: where the answers are kept; one file per process in `output` by default.

    Raises:
        ConfigError: the folder holds a run of another benchmark.
        DataError: every image is unusable, another run is writing to the folder, or the disk is
            full.
        SteerError: memory runs out with a batch of one, or the model cannot be steered as asked.
    """
    _refuse_other_benchmark(output / RUN_NAME, task.name)
    if settings.deterministic:
        batch_size, share_prefix = 1, False
    digests, failures = check_images(task.items)
    usable = [item for item in task.items if item.id in digests]
    if not usable:
        raise DataError(
            f"none of the {len(task.items)} items has a usable image; the first problem: "
            f"{failures[0]['error'] if failures else 'there are no items'}"
        )
    provenance = {
        "benchmark": task.name,
        "model": model_fingerprint(model, model_name),
        "settings": settings.as_dict(),
        "versions": versions(),
        "methods": {arm.name: arm.config for arm in arms},
    }
    trivial = {arm.name: dict(arm.decoding) for arm in arms if arm.decoding}
    if trivial:
        provenance["decoding"] = trivial
    workers = workers or Workers()
    if workers.is_main:
        write_json(output / RUN_NAME, provenance)
    result = RunResult({}, failures, provenance=provenance)
    keys: dict[str, dict[str, str]] = {}
    logs = logs or LocalLogs(output)
    output.mkdir(parents=True, exist_ok=True)
    with logs.open(workers) as log:
        for arm in arms:
            chosen = arm.settings(settings)
            generator = Generator(model, processor, chosen, task.first_token_words)
            worker = _ArmRun(arm, generator, log, output, batch_size, digests, provenance, workers)
            worker.logs = logs
            worker.shares = share_prefix
            with _noting(result.notes.setdefault(arm.name, [])):
                keys[arm.name] = worker.run(usable)
            result.n_generated += worker.n_generated
        records = log.records
    if workers.size > 1:
        workers.wait()
        records = logs.read()
    result.records = _collected(records, keys)
    return result


def _collected(
    records: Mapping[str, dict[str, Any]], keys: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm -> item -> record."""
    missing = sum(key not in records for by_item in keys.values() for key in by_item.values())
    if missing:
        raise _answers_missing(missing)
    return {arm: {i: records[key] for i, key in by_item.items()} for arm, by_item in keys.items()}


def _answers_missing(count: int) -> DataError:
    return DataError(
        f"{count} answers are missing, since a process ended early; run the same command again, "
        "which generates only those"
    )


def _turns(items: Mapping[str, Item]) -> list[list[Item]]:
    """Items that begin a conversation, those that follow them, and so on."""
    depth: dict[str, int] = {}
    for item in items.values():
        path = [item]
        while (earlier := path[-1].after) is not None and earlier not in depth:
            path.append(items[earlier])
        start = -1 if path[-1].after is None else depth[str(path[-1].after)]
        for step, member in enumerate(reversed(path), 1):
            depth[member.id] = start + step
    groups: list[list[Item]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for item in items.values():
        groups[depth[item.id]].append(item)
    return groups


class _ArmRun:
    """One arm over all items."""

    def __init__(
        self,
        arm: Arm,
        generator: Generator,
        log: Log,
        output: Path,
        batch_size: int,
        digests: Mapping[str, str],
        provenance: Mapping[str, Any],
        workers: Workers,
    ) -> None:
        self._arm = arm
        self._generator = generator
        self._log = log
        self._timings = output / workers.part(TIMINGS_NAME)
        self._workers = workers
        self._batch_size = batch_size
        self._digests = digests
        self._common = {
            "model": provenance["model"],
            "versions": provenance["versions"],
            "settings": generator.settings.as_dict(),
            "methods": arm.config,
        }
        self.n_generated = 0
        self.shares = False
        self.logs: Logs = LocalLogs(output)

    def run(self, items: Sequence[Item]) -> dict[str, str]:
        """Generate this process's share; returns the key of every item's record."""
        by_id = {item.id: item for item in items}
        keys: dict[str, str] = {}
        for turn, group in enumerate(_turns(by_id)):
            if turn:
                self._read_the_others()
            prompts = {item.id: self._prompt(item, by_id, keys) for item in group}
            keys |= {item.id: self._key(item, prompts[item.id]) for item in group}
            self._generate(group, prompts, keys)
        return keys

    def _prompt(self, item: Item, by_id: Mapping[str, Item], keys: Mapping[str, str]) -> str:
        """The whole prompt, with the earlier turns of a conversation as they were answered."""
        history: list[tuple[str, str]] = []
        earlier = item.after
        while earlier is not None:
            record = self._log.records.get(keys[earlier])
            if record is None:
                raise _answers_missing(1)
            history.insert(0, (by_id[earlier].prompt, record["text"]))
            earlier = by_id[earlier].after
        processor = self._generator.processor
        return render_prompt(processor, item.prompt, history, n_images=int(item.has_image))

    def _read_the_others(self) -> None:
        """Wait for the other processes, and read what they have logged."""
        if self._workers.size > 1:
            self._workers.wait()
            self._log.records |= self.logs.read()

    def _batches(
        self, items: Sequence[Item], prompts: Mapping[str, str], steering: Steering
    ) -> list[list[Item]]:
        """By length, so that little is padded; by content, so that the order does not matter.

        Questions without an image make batches of their own.
        """
        ordered = sorted(items, key=lambda item: (len(prompts[item.id]), item.id))
        seeing = [item for item in ordered if item.has_image]
        blind = self._chunks([item for item in ordered if not item.has_image])
        return self._batches_with_images(seeing, prompts, steering) + blind

    def _chunks(self, items: Sequence[Item]) -> list[list[Item]]:
        size = self._batch_size
        return [list(items[start : start + size]) for start in range(0, len(items), size)]

    def _batches_with_images(
        self, ordered: Sequence[Item], prompts: Mapping[str, str], steering: Steering
    ) -> list[list[Item]]:
        size = self._batch_size
        plain = self._chunks(ordered)
        if not ordered or not self.shares or steering.plan.prefix is None:
            self.shares = False
            return plain
        batches: list[list[Item]] = [[]]
        groups: dict[str, list[Item]] = {}
        for item in ordered:
            groups.setdefault(self._digests[item.id], []).append(item)
        for group in groups.values():
            for start in range(0, len(group), size):
                part = group[start : start + size]
                if len(batches[-1]) + len(part) > size:
                    batches.append([])
                batches[-1].extend(part)
        if not self._agree(batches[0], prompts, steering):
            self.shares = False
            return plain
        return batches

    def _agree(self, items: Sequence[Item], prompts: Mapping[str, str], steering: Steering) -> bool:
        """Whether sharing gives these items the answers of whole prompts."""
        shared, whole = (
            [(answer.text, answer.layout) for answer in self._answer(items, prompts, sharing)]
            for sharing in (steering, None)
        )
        if shared != whole:
            warnings.warn(
                "sharing the pass over the image changed an answer, so every prompt is computed "
                "whole",
                SteerWarning,
                stacklevel=2,
            )
        return shared == whole

    def _generate(
        self, items: Sequence[Item], prompts: Mapping[str, str], keys: Mapping[str, str]
    ) -> None:
        model, processor = self._generator.model, self._generator.processor
        size = self._batch_size
        with vlm_steer.steer(model, self._arm.methods or None, processor=processor) as steering:
            known = self._log.records
            missing = [item for item in items if keys[item.id] not in known]
            batches = self._batches(items, prompts, steering) if missing else []
            share = batches[self._workers.rank :: self._workers.size]
            pending = [batch for batch in share if any(keys[i.id] not in known for i in batch)]
            sharing = steering if self.shares else None
            total = sum(map(len, pending))
            with tqdm(
                total=total,
                desc=self._arm.name,
                unit="answer",
                disable=None if total and self._workers.is_main else True,
            ) as bar:
                for batch in pending:
                    with measured(steering.plan.model.decoder, model.device) as cost:
                        outputs, size = halving(
                            lambda chunk: self._answer(chunk, prompts, sharing),
                            batch,
                            size,
                            _tell_halved,
                        )
                    changed = _changed_something(steering.effect()) if self._arm.methods else None
                    fresh = [
                        self._record(item, keys[item.id], prompts[item.id], answer, changed)
                        for item, answer in zip(batch, outputs, strict=True)
                        if keys[item.id] not in known
                    ]
                    self._log.append(fresh)
                    self._log_cost(outputs, cost)
                    self.n_generated += len(fresh)
                    bar.update(len(batch))

    def _answer(
        self, items: Sequence[Item], prompts: Mapping[str, str], sharing: Steering | None
    ) -> list[Output]:
        images = [item.image.load() for item in items] if items[0].has_image else None
        digests = [self._digests[item.id] for item in items]
        with torch.inference_mode():
            return self._generator(
                [prompts[item.id] for item in items],
                images,
                [item.id for item in items],
                None if sharing is None else (sharing, digests),
            )

    def _key(self, item: Item, prompt: str) -> str:
        return answer_key(self._common, item.id, prompt, self._digests[item.id])

    def _record(
        self, item: Item, key: str, prompt: str, answer: Output, changed: bool | None
    ) -> dict[str, Any]:
        settings = self._generator.settings
        return {
            "key": key,
            "arm": self._arm.name,
            "item": item.id,
            "prompt": prompt,
            "text": answer.text,
            "tokens": answer.n_tokens,
            "truncated": answer.truncated,
            "margin": answer.margin,
            "seed": item_seed(settings.seed, item.id) if settings.temperature else None,
            "layout": answer.layout,
            "batch": answer.batch,
            "changed": changed,
        }

    def _log_cost(self, outputs: Sequence[Output], cost: Measured) -> None:
        row = {
            "arm": self._arm.name,
            "answers": len(outputs),
            "tokens": sum(output.n_tokens for output in outputs),
            "seconds": round(cost.seconds, 4),
            "passes": cost.passes,
            "memory": cost.memory,
        }
        with (
            reporting_write_errors(self._timings),
            self._timings.open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(row) + "\n")


def _refuse_other_benchmark(path: Path, name: str) -> None:
    """Its scores and samples would be overwritten."""
    earlier = read_json(path).get("benchmark", name) if path.is_file() else name
    if earlier != name:
        raise ConfigError(
            f"{path.parent} holds a run of {earlier}; give the run of {name} another --output"
        )


def answer_key(common: Mapping[str, Any], item: str, prompt: str, digest: str) -> str:
    """The key of an answer: a hash over everything that it depends on.

    Args:
        common: model, versions, settings and methods.
        item: its item.
        prompt: the whole prompt.
        digest: hash of the image.
    """
    return content_key({**common, "item": item, "prompt": prompt, "image": digest})


def check_images(items: Sequence[Item]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Content hashes by item, and the items whose image cannot be decoded.

    Every image is decoded once up front: a bad file is reported now and not hours later.
    """
    seen: dict[Any, str | ImageError] = {}
    digests: dict[str, str] = {}
    failures: list[dict[str, str]] = []
    for item in tqdm(items, desc="images", unit="item", disable=None, leave=False):
        if item.image not in seen:
            try:
                if item.has_image:
                    item.image.load()
                seen[item.image] = item.image.digest()
            except ImageError as error:
                seen[item.image] = error
        found = seen[item.image]
        if isinstance(found, ImageError):
            failures.append({"item": item.id, "image": item.image.name, "error": str(found)})
        else:
            digests[item.id] = found
    return digests, failures


def _changed_something(effect: Mapping[str, Any]) -> bool:
    return any(
        bool(seen["probability_moved"])
        or any(touch["rows"] > 0 for touch in seen["layers"].values())
        for seen in effect.values()
    )


def _tell_halved(size: int) -> None:
    warnings.warn(f"out of memory: continuing with --batch-size {size}", SteerWarning, stacklevel=2)


@contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Collect the steering's warnings; pass all others on."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SteerWarning)
            yield
    finally:
        for warning in caught:
            if issubclass(warning.category, SteerWarning):
                if str(warning.message) not in notes:
                    notes.append(str(warning.message))
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
