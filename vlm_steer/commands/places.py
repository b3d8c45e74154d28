"""Places to write to, checked before anything slow begins, whose result would be lost otherwise."""

import os
from pathlib import Path

from vlm_steer.errors import ConfigError, DataError

__all__ = ["check_file", "check_folder"]


def check_folder(folder: Path, option: str = "--output") -> None:
    """Make a folder for results.

    Raises:
        ConfigError: It is a file.
        DataError: It cannot be made, or not be written to.
    """
    if folder.is_file():
        raise ConfigError(f"{option} {folder} is a file. Give a folder.")
    _make(folder)


def check_file(file: Path, option: str = "--output", *, example: str) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        ConfigError: The file is a folder.
        DataError: Its folder cannot be made, or not be written to.
    """
    if file.is_dir():
        raise ConfigError(
            f"{option} {file} is a folder. Give the file to write, such as {example}."
        )
    _make(file.parent)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror}. Give another place."
        ) from error
    if not os.access(folder, os.W_OK):
        raise DataError(f"cannot write to {folder}: no permission. Give another place.")
