"""Every golden case, from this folder and from the folders named in VLM_STEER_GOLDEN."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm_steer import functional

HERE = Path(__file__).parent

# Functions of golden cases that are not written yet. Names may only leave this set.
NOT_WRITTEN: frozenset[str] = frozenset()


class Case(NamedTuple):
    name: str
    function: str
    params: dict[str, Any]
    atol: float
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def run(self, **replaced: Any) -> dict[str, Tensor]:
        """Calls the function and names its results as the case does."""
        result = getattr(functional, self.function)(**{**self.inputs, **self.params, **replaced})
        if isinstance(result, Tensor):
            (name,) = self.outputs
            return {name: result}
        return {name: getattr(result, name) for name in self.outputs}


def load_case(path: Path) -> Case:
    spec = json.loads(path.read_text(encoding="utf-8"))
    tensors = load_file(path.with_suffix(".safetensors"))

    def side(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return Case(
        name=path.stem,
        function=spec["function"],
        params=spec["params"],
        atol=spec["atol"],
        inputs=side("in."),
        outputs=side("out."),
    )


def case_files() -> list[Path]:
    extra = os.environ.get("VLM_STEER_GOLDEN", "")
    folders = [HERE, *(Path(folder) for folder in extra.split(os.pathsep) if folder)]
    files = [path for folder in folders for path in sorted(folder.rglob("*.json"))]
    return [path for path in files if path.with_suffix(".safetensors").is_file()]


FILES = case_files()
WRITTEN = [case for case in map(load_case, FILES) if case.function not in NOT_WRITTEN]


def assert_matches(actual: Tensor, expected: Tensor, *, atol: float) -> None:
    if not expected.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    excluded = expected == -torch.inf
    assert torch.equal(actual == -torch.inf, excluded)
    torch.testing.assert_close(
        actual.masked_fill(excluded, 0), expected.masked_fill(excluded, 0), rtol=1e-4, atol=atol
    )


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case.name)
def test_function_reproduces_the_official_values(case: Case) -> None:
    results = case.run()
    assert results.keys() == case.outputs.keys()
    for name, expected in case.outputs.items():
        assert_matches(results[name], expected, atol=case.atol)


def test_nothing_that_exists_is_listed_as_not_written() -> None:
    assert [name for name in sorted(NOT_WRITTEN) if hasattr(functional, name)] == []


def test_the_bundled_cases_are_found() -> None:
    assert len([path for path in FILES if path.is_relative_to(HERE)]) == 55
