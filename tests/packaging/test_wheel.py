"""The wheel holds what it should, and works without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import vlm_steer
from tests.packaging.test_project import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder))
    return Path(built)


def test_the_wheel_holds_both_packages_their_data_and_the_configurations(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"vlm_steer/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    expected |= {
        "vlm_steer/__init__.py",
        "vlm_steer/py.typed",
        "vlm_steer/methods/var.py",
        "vlm_steer/tiny/weights/model.safetensors",
        "vlm_steer_eval/__init__.py",
        "vlm_steer_eval/py.typed",
    }
    assert expected - names == set()


def test_the_wheel_holds_nothing_else(wheel):
    roots = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert roots == {
        "vlm_steer",
        "vlm_steer_eval",
        f"vlm_steer-{vlm_steer.__version__}.dist-info",
    }
    names = zipfile.ZipFile(wheel).namelist()
    unwanted = (".pyc", ".pkl", ".pt", ".bin", ".pickle")
    assert [name for name in names if name.endswith(unwanted)] == []


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"vlm_steer-{vlm_steer.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert f"Version: {vlm_steer.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "vlm-steer = vlm_steer.cli:main" in entry_points


def test_the_unpacked_wheel_finds_its_presets_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import vlm_steer, vlm_steer.config as c; print(vlm_steer.__file__);"
        "print(c.find_preset('var_official')); print(c.resolve('var_official+vcd')[0].keep)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    seen = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    package, preset, keep = seen.stdout.split()
    assert package == str(tmp_path / "site" / "vlm_steer" / "__init__.py")
    assert preset == str(tmp_path / "site" / "vlm_steer" / "configs" / "var_official.yaml")
    assert keep == "0.6"
