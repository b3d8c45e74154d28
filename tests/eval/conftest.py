"""Where the reference cases and data lie, and what the harness tests share."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"reference folder shared/{name} is absent", allow_module_level=True)
    return folder


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    folder = _folder("golden/eval")

    def load(name: str) -> Any:
        path = folder / name
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            return json.load(file)

    return load


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return _folder("golden/eval")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    return _folder("data")
