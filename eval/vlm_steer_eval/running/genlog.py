"""The generation log: append-only JSON lines that survive a kill, keyed by content."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vlm_steer.errors import DataError
from vlm_steer_eval.files import reporting_write_errors

__all__ = ["GenerationLog", "content_key", "parse_log", "read_logs"]


def content_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, independent of the order of its keys."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class GenerationLog:
    """Records by key, in a file that only grows; use as a context manager.

    A batch is appended with one write and flushed to disk, so that a kill can tear its last line
    only. Opening cuts a torn line off and forgets it; the batch is then generated again.

    Args:
        path: the file; created with its folder where absent.
        beside: logs of other processes, which are only read, and only when this one is opened.

    Raises:
        DataError: another process holds the log, a line in the middle is damaged, or the disk is
            full.
    """

    def __init__(self, path: Path, beside: Sequence[Path] = ()) -> None:
        self.path = path
        self._beside = beside
        self.records: dict[str, dict[str, Any]] = {}
        self.repaired = False

    def __enter__(self) -> Self:
        with reporting_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that closing after a failed write does not write again.
            self._file = self.path.open("ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DataError(
                f"{self.path} is being written by another run; wait for it, or give another "
                "--output"
            ) from error
        try:
            self._read()
        except DataError:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, each with its `key`, and flush them to disk.

        Raises:
            DataError: the disk is full; what was logged before is intact.
        """
        fresh = [dict(record) for record in records]
        lines = "".join(
            json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in fresh
        )
        with reporting_write_errors(self.path):
            rest = memoryview(lines.encode())
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        self.records.update((record["key"], record) for record in fresh)

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read() or b""
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            with reporting_write_errors(self.path):
                self._file.truncate(len(content) - len(torn))
            self.repaired = True
        self.records = read_logs(self._beside) | parse_log(self.path, whole)


def read_logs(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The records of several logs; a torn last line, which may still be written, is left out.

    Raises:
        DataError: a log cannot be read, or a line in the middle is damaged.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}); check its permissions") from error
        records |= parse_log(path, content.rpartition(b"\n")[0])
    return records


def parse_log(path: object, whole: bytes) -> dict[str, dict[str, Any]]:
    """Records by key of whole lines; `path` is named in errors.

    Raises:
        DataError: a line is damaged.
    """
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number} is damaged ({error}); delete that line to generate it "
                "again, or give another --output"
            ) from error
    return records
