"""Finished runs as logs of inspect_ai, so that `inspect view` shows them."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.files import read_json, read_rows

__all__ = ["export_run"]

_SHOWN_AS = ("text", "caption")
_TRUTHS = ("label", "objects")


def export_run(run: Path, output: Path) -> list[Path]:
    """Write one log per arm of a folder that `vlm-steer eval` has written.

    Every answer becomes a sample with its prompt, its truth, how it was read (as metadata) and its
    score; the metrics with their intervals stand in the results.

    Args:
        run: the folder.
        output: folder of the logs, `ARM.json`.

    Returns:
        The files, in order of the arms.

    Raises:
        ConfigError: inspect_ai is not installed.
        DataError: the folder holds no finished run, or the logs cannot be written.
    """
    try:
        import inspect_ai.log as log
    except ImportError as error:
        raise ConfigError(
            f"exporting to inspect_ai needs it installed ({error}); run `pip install inspect_ai`"
        ) from error
    for name in ("scores.json", "run.json", "samples.jsonl"):
        if not (run / name).is_file():
            raise DataError(
                f"{run} holds no {name}; give a folder that `vlm-steer eval` has finished"
            )
    scores, about = read_json(run / "scores.json"), read_json(run / "run.json")
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_rows(run / "samples.jsonl"):
        by_arm.setdefault(str(row["arm"]), []).append(row)
    # The time of the run, so that exporting twice gives equal files.
    created = datetime.fromtimestamp((run / "run.json").stat().st_mtime, UTC).isoformat()
    written = []
    for number, (arm, rows) in enumerate(by_arm.items()):
        model = str(about["model"]["name"])
        document = log.EvalLog(
            status="success",
            eval=log.EvalSpec(
                created=created,
                task=str(scores["benchmark"]),
                dataset=log.EvalDataset(name=str(scores["benchmark"]), samples=len(rows)),
                model=f"vlm_steer/{model}",
                model_args={"steer": about["methods"][arm]},
                config=log.EvalConfig(),
                metadata={"arm": arm, **{k: about[k] for k in ("settings", "versions")}},
            ),
            results=_results(log, scores["arms"][arm], len(rows)),
            samples=[_sample(model, row) for row in rows],
        )
        path = output / f"{number:02d}-{_file_name(arm)}.json"
        try:
            output.mkdir(parents=True, exist_ok=True)
            log.write_eval_log(document, str(path), format="json")
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror})") from error
        written.append(path)
    return written


def _results(log: Any, parts: Mapping[str, Any], n: int) -> Any:
    """One score per part of the benchmark, its metrics with their intervals."""
    return log.EvalResults(
        total_samples=n,
        completed_samples=n,
        scores=[
            log.EvalScore(
                name=part,
                scorer="vlm_steer",
                metrics={
                    name: log.EvalMetric(
                        name=name, value=entry["value"], metadata={"ci95": entry["ci95"]}
                    )
                    for name, entry in found["metrics"].items()
                    if entry["value"] is not None
                },
            )
            for part, found in parts.items()
        ],
    )


def _sample(model: str, row: Mapping[str, Any]) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score

    text = str(next(row[key] for key in _SHOWN_AS if key in row))
    truth = next((row[key] for key in _TRUTHS if key in row), "")
    stop = "max_tokens" if row.get("truncated") else "stop"
    return EvalSample(
        id=str(row["item"]),
        epoch=1,
        input=str(row["prompt"]),
        target=[str(part) for part in truth] if isinstance(truth, list) else str(truth),
        output=ModelOutput.from_content(f"vlm_steer/{model}", text, stop_reason=stop),
        scores={"vlm_steer": Score(value=_value(row), answer=str(row.get("parsed") or text))},
        metadata=json.loads(json.dumps({k: v for k, v in row.items() if k not in _SHOWN_AS})),
    )


def _value(row: Mapping[str, Any]) -> float | str:
    """Right or wrong (C, I) where there is a label, else what counts, or nothing (N)."""
    if "parsed" in row and "label" in row:
        return "C" if row["parsed"] == row["label"] else "I"
    found = row.get("hallucinated", row.get("rating"))
    if found is None:
        return "N"
    return float(len(found) if isinstance(found, list) else found)


def _file_name(arm: str) -> str:
    return "".join(char if char.isalnum() or char in "+-_." else "_" for char in arm)
