"""Generation logs on any file system: immutable numbered parts per process, merged at the end.

An object store cannot append to a file, and two processes cannot share one. So every batch becomes
a part of its own, `parts/RANK-NUMBER.jsonl`, which is created once and never touched again. Whoever
opens the log reads all parts; a part that a kill has torn counts as far as its last whole line.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from vlm_steer.errors import DataError

from .genlog import GenerationLog, parse_log, read_logs
from .workers import Workers

__all__ = [
    "LOG_NAME",
    "LocalLogs",
    "Log",
    "Logs",
    "PartLog",
    "RemoteLogs",
    "local_copy",
    "remote_url",
]

LOG_NAME = "generations.jsonl"
_PARTS = "parts"


class Log(Protocol):
    """Records by key that only grow; a context manager."""

    records: dict[str, dict[str, Any]]

    def __enter__(self) -> Self:
        """Read what there is."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        ...

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep records, each with its `key`."""
        ...


class Logs(Protocol):
    """The logs of all processes of a run."""

    def open(self, workers: Workers) -> Log:
        """The log of one process."""
        ...

    def read(self) -> dict[str, dict[str, Any]]:
        """What all processes have logged so far."""
        ...


class LocalLogs:
    """One growing file per process in a folder.

    Args:
        folder: where the files lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, workers: Workers) -> GenerationLog:
        """The log of one process, which knows what the others had logged before."""
        mine = self._folder / workers.part(LOG_NAME)
        return GenerationLog(mine, [path for path in self._paths() if path != mine])

    def read(self) -> dict[str, dict[str, Any]]:
        """What all processes have logged so far."""
        return read_logs(self._paths())

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(LOG_NAME.replace(".", "*.")))


class RemoteLogs:
    """Parts under an address that fsspec knows, such as `s3://bucket/run`.

    Args:
        url: the address of the run.

    Raises:
        DataError: the file system is unknown, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise DataError(
                f"{url} cannot be used ({error}); give a folder, or an address whose file system "
                "fsspec has installed"
            ) from error

    def open(self, workers: Workers) -> "PartLog":
        """The log of one process."""
        return PartLog(self, workers.rank)

    def read(self) -> dict[str, dict[str, Any]]:
        """What all processes have logged so far, in order of process and number."""
        records: dict[str, dict[str, Any]] = {}
        for name in self.names():
            with self._reporting(name):
                content = self._fs.cat_file(f"{self._root}/{name}")
            records |= parse_log(f"{self.url}/{name}", content.rpartition(b"\n")[0])
        return records

    def names(self) -> list[str]:
        """The parts that there are, in order."""
        with self._reporting(_PARTS):
            self._fs.invalidate_cache()
            found = self._fs.glob(f"{self._root}/{_PARTS}/*.jsonl")
        return sorted(f"{_PARTS}/{str(path).rpartition('/')[2]}" for path in found)

    def create(self, name: str, content: bytes) -> None:
        """Write a file that must not exist yet.

        Raises:
            DataError: it does, or it cannot be written.
        """
        path = f"{self._root}/{name}"
        with self._reporting(name):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                self._fs.pipe_file(path, content, mode="create")
            except FileExistsError as error:
                raise DataError(
                    f"{self.url}/{name} was just written by another run; wait for it, or give "
                    "another --output"
                ) from error

    def publish(self, folder: Path) -> None:
        """Copy the files of a local folder there.

        Raises:
            DataError: something cannot be written.
        """
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._write(path.relative_to(folder).as_posix(), path.read_bytes())

    def fetch(self, folder: Path, patterns: Sequence[str]) -> None:
        """Copy files from there into a local folder.

        Args:
            folder: created where it is absent.
            patterns: names, `*` standing for anything; what matches none is left where it is.

        Raises:
            DataError: something cannot be read or written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in patterns:
            with self._reporting(pattern):
                for path in self._fs.glob(f"{self._root}/{pattern}"):
                    (folder / str(path).rpartition("/")[2]).write_bytes(self._fs.cat_file(path))

    def merge(self) -> None:
        """Write all parts as one log, in order of process and number.

        Raises:
            DataError: something cannot be read or written.
        """
        merged = "".join(_line(record) for record in self.read().values())
        self._write(LOG_NAME, merged.encode())

    def _write(self, name: str, content: bytes) -> None:
        with self._reporting(name):
            path = f"{self._root}/{name}"
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, content)

    @contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.url}/{name} cannot be read or written ({error}); what was logged before is "
                "kept: check the address and its permissions, and run the same command again"
            ) from error


class PartLog:
    """The log of one process among the parts of a run; use as a context manager.

    Args:
        logs: all parts.
        rank: number of the process.
    """

    def __init__(self, logs: RemoteLogs, rank: int) -> None:
        self._logs = logs
        self._rank = rank
        self._number = 0
        self.records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        mine = re.compile(rf"{_PARTS}/{self._rank:03d}-(\d+)\.jsonl")
        numbers = [int(found[1]) for name in self._logs.names() if (found := mine.fullmatch(name))]
        self._number = max(numbers, default=-1) + 1
        self.records = self._logs.read()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Every part is whole already."""

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records as one new part.

        Raises:
            DataError: it cannot be written, or another run has written it.
        """
        fresh = [dict(record) for record in records]
        content = "".join(map(_line, fresh)).encode()
        self._logs.create(f"{_PARTS}/{self._rank:03d}-{self._number:06d}.jsonl", content)
        self._number += 1
        self.records.update((record["key"], record) for record in fresh)


def remote_url(output: Path) -> str | None:
    """The address that an option means; None for a folder.

    An option that is a path has lost the second slash of `s3://bucket`.
    """
    found = re.match(r"([a-z][a-z0-9+.]+):/+(.+)$", output.as_posix())
    if found is None:
        return None
    return f"{found[1]}://{'/' if found[1] == 'file' else ''}{found[2]}"


@contextmanager
def local_copy(run: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """The folder of a run, or a passing copy of some of its files if it lies at an address.

    Args:
        run: a folder, or an address as an option holds it.
        patterns: names of the files to copy, `*` standing for anything.

    Raises:
        DataError: the address cannot be used.
    """
    url = remote_url(run)
    if url is None:
        yield run
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / run.name
        RemoteLogs(url).fetch(folder, patterns)
        yield folder


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
