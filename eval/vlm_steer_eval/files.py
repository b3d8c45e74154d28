"""Reading what users give and writing what must not be lost."""

import errno
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError

__all__ = [
    "image_key",
    "read_json",
    "read_rows",
    "read_text",
    "reporting_write_errors",
    "write_json",
    "write_rows",
    "write_text",
]


def read_json(path: Path) -> Any:
    """The contents of a JSON file, gzipped or not.

    Raises:
        DataError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON ({error}); if it was copied or unpacked, do so again"
        ) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file or of a JSON array, gzipped or not.

    Raises:
        DataError: the file is missing, empty or malformed; the message names the line.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = read_json(path)
    else:
        rows = [
            _parse_line(path, *line) for line in enumerate(text.splitlines(), 1) if line[1].strip()
        ]
    if not rows:
        raise DataError(f"{path} holds no rows; expected one JSON object per line, or a JSON array")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, found {row!r}")
    return list(rows)


def read_text(path: Path) -> str:
    """The text of a file, gzipped or not.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                return file.read()
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected text") from error


def image_key(value: object) -> str:
    """One spelling for an image's id and file name.

    The id of a COCO file name is its trailing number ("COCO_val2014_000000000042.jpg" is image 42);
    other names stand for themselves.
    """
    text = str(value)
    stem, dot, suffix = text.rpartition("/")[2].rpartition(".")
    stem = stem if dot and not suffix.isdigit() else text
    digits = stem.rpartition("_")[2]
    return str(int(digits)) if digits.isascii() and digits.isdigit() else text


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """

    def fill(file: Any) -> None:
        file.write(text)

    _replace(path, fill)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON whole or not at all; NaN is refused.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines whole or not at all.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """

    def fill(file: Any) -> None:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    _replace(path, fill)


@contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors about writing `path` into a `DataError` with a way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk is full while writing {path}; everything finished so far is kept: free "
                "some space and run the same command again to continue"
            ) from error
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}); give a folder you may write to"
        ) from error


def _replace(path: Path, fill: Callable[[Any], None]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number} is not valid JSON ({error.msg}); expected one object per line"
        ) from error
