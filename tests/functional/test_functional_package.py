"""The package as a whole: what it imports, what it exports, what its page says."""

import ast
import re
from pathlib import Path
from typing import Any

from vlm_steer import functional

PACKAGE = Path(functional.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "functional.md"
ALLOWED = {"collections", "math", "torch", "typing", "vlm_steer.errors", "vlm_steer.functional"}


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_the_mathematics_imports_torch_and_nothing_heavier() -> None:
    for path in PACKAGE.glob("*.py"):
        for module in imported_modules(path):
            assert any(module == name or module.startswith(f"{name}.") for name in ALLOWED), (
                f"{path.name} imports {module}"
            )


def test_every_public_function_is_exported_once() -> None:
    defined = {
        node.name
        for path in PACKAGE.glob("[a-z]*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert sorted(defined) == sorted(functional.__all__)


def test_the_page_names_every_function_and_its_examples_run() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    assert {name for name in functional.__all__ if name.islower()} <= named
    scope: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(example, scope)
    assert scope["boosted"].shape == (1, 8, 1, 40)
    assert scope["output"].shape == scope["q"].shape
