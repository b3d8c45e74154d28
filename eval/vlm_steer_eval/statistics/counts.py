"""What metrics are computed from, kept beside the scores: one row of counts per unit.

A unit is what a benchmark counts by: a question, a caption, MME's pair of questions, a set of
pictures of HallusionBench. Runs are compared unit by unit, so every result keeps its rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.files import read_rows, write_rows

__all__ = ["COUNTS_NAME", "Unit", "read_units", "write_units"]

COUNTS_NAME = "counts.jsonl"


@dataclass(frozen=True)
class Unit:
    """One row of counts.

    Attributes:
        id: unique within its arm.
        cluster: the unit of resampling, usually the image.
        part: the part of the benchmark it belongs to; empty for none.
        counts: one number per column of the benchmark's metrics.
    """

    id: str
    cluster: str
    part: str
    counts: Sequence[float]


def write_units(path: Path, arms: Mapping[str, Iterable[Unit]]) -> None:
    """Write the units of every arm as JSON lines.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    write_rows(
        path,
        (
            {
                "arm": arm,
                "unit": unit.id,
                "cluster": unit.cluster,
                "part": unit.part,
                "counts": list(unit.counts),
            }
            for arm, units in arms.items()
            for unit in units
        ),
    )


def read_units(path: Path, width: int) -> dict[str, dict[str, Unit]]:
    """Arm -> unit id -> unit.

    Args:
        path: written by `write_units`.
        width: number of columns that the benchmark's metrics have.

    Raises:
        DataError: the file is absent or damaged, or of another version.
    """
    arms: dict[str, dict[str, Unit]] = {}
    for number, row in enumerate(read_rows(path), 1):
        unit = _unit(path, number, row, width)
        arm = arms.setdefault(str(row["arm"]), {})
        if unit.id in arm:
            raise DataError(f"{path}, row {number}: {unit.id} occurs twice; score the run again")
        arm[unit.id] = unit
    return arms


def _unit(path: Path, number: int, row: Mapping[str, Any], width: int) -> Unit:
    counts = row.get("counts")
    named = all(isinstance(row.get(key), str) for key in ("arm", "unit", "cluster", "part"))
    if not named or not isinstance(counts, list) or len(counts) != width:
        raise DataError(
            f"{path}, row {number}: expected arm, unit, cluster, part and {width} counts, found "
            f"{row!r}; score the run again"
        )
    return Unit(row["unit"], row["cluster"], row["part"], counts)
