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


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    """The embedded model and its processor."""
    from vlm_steer import load_tiny

    return load_tiny()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Four pictures of the little world, as files."""
    from vlm_steer.tiny.scenes import image

    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(4):
        image("iid", 100_000 + index).save(folder / f"scene_{index}.png")
    return folder


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    """Two questions about each picture of `image_folder`."""
    rows = [
        {
            "question_id": 2 * index + offset,
            "image": f"scene_{index}.png",
            "text": f"Is there a {name} in the image?",
            "label": label,
        }
        for index in range(4)
        for offset, (name, label) in enumerate([("car", "yes"), ("traffic light", "no")], 1)
    ]
    path = tmp_path / "pope_random.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
