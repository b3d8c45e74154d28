"""The answers that a run has logged, to be scored otherwise: no model is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.questions import list_some
from vlm_steer_eval.benchmarks.tasks import Item, Task
from vlm_steer_eval.files import read_json

from .generation import Settings
from .parts import LocalLogs
from .runner import RUN_NAME, RunResult, answer_key, check_images

__all__ = ["logged_run"]

Record = dict[str, Any]


def logged_run(task: Task, folder: Path) -> RunResult:
    """Find the answers to the items of a task in the log of a run.

    The task may read or label them otherwise than the run did, and may leave items out. An answer
    counts only if everything that it depends on is that of the run: an older one, or one to another
    prompt or image, is none.

    Args:
        task: the same benchmark.
        folder: what `run_arms` has written.

    Raises:
        DataError: the folder holds no run of this benchmark, or answers are missing.
    """
    if not (folder / RUN_NAME).is_file():
        raise DataError(f"{folder} holds no {RUN_NAME}; give a folder written by `vlm-steer eval`")
    about = read_json(folder / RUN_NAME)
    if about["benchmark"] != task.name:
        raise DataError(f"{folder} holds a run of {about['benchmark']}, not of {task.name}")
    digests, failures = check_images(task.items)
    usable = [item for item in task.items if item.id in digests]
    by_item: dict[str, list[Record]] = {}
    for record in LocalLogs(folder).read().values():
        by_item.setdefault(record["item"], []).append(record)
    result = RunResult({}, failures, provenance=about)
    for arm in about["methods"]:
        known = _depends_on(about, arm)
        found = {i.id: _answer(i, by_item.get(i.id, []), known, digests[i.id]) for i in usable}
        missing = [name for name, record in found.items() if record is None]
        if missing or not found:
            raise DataError(
                f"{folder} has no answer of the arm {arm} to {len(missing)} of {len(usable)} items "
                f"({list_some(missing)}); run `vlm-steer eval` there, with the same questions, "
                "suffix and images"
            )
        result.records[arm] = {name: record for name, record in found.items() if record is not None}
    return result


def _depends_on(about: Mapping[str, Any], arm: str) -> dict[str, Any]:
    decoding = about.get("decoding", {}).get(arm, {})
    return {
        "model": about["model"],
        "versions": about["versions"],
        "settings": Settings(**{**about["settings"], **decoding}).as_dict(),
        "methods": about["methods"][arm],
    }


def _answer(
    item: Item, records: list[Record], known: Mapping[str, Any], digest: str
) -> Record | None:
    """The one record that was made for this item as it is."""
    fitting = [
        record
        for record in records
        if item.prompt in record["prompt"]
        and record["key"] == answer_key(known, item.id, record["prompt"], digest)
    ]
    if len(fitting) > 1:
        raise DataError(
            f"{item.id} was answered under {len(fitting)} prompts that all hold {item.prompt!r}; "
            "give every run an --output of its own"
        )
    return fitting[0] if fitting else None
