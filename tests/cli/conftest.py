"""Pictures, and a way to call the command."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from vlm_steer import cli


class Ran(NamedTuple):
    """What a call of ``vlm-steer`` did."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Ran]:
    """Calls ``vlm-steer``, with its own commands only, in this process."""
    monkeypatch.setattr(cli, "entry_points", lambda group: ())
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        seen = capsys.readouterr()
        return Ran(int(caught.value.code or 0), seen.out, seen.err)

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    """Two small photographs of nothing."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "red.png", folder / "blue.jpg"]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(path)
        image = Image.open(path)
        image.paste(colour, (0, 0, 30, 48))
        image.save(path)
    return paths
