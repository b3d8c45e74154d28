"""The project file, the constraints, the documents and the continuous integration agree."""

import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from ruamel.yaml import YAML

import vlm_steer

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().lower().splitlines()
    if not line.startswith("#")
)
EXTRAS = PROJECT["optional-dependencies"]
# gradio caps Pillow below the version that everything else is tested with.
REQUIREMENTS = [
    Requirement(text)
    for text in (
        *PROJECT["dependencies"],
        *(text for extra, texts in EXTRAS.items() if extra != "ui" for text in texts),
    )
]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_is_pinned_inside_its_range(requirement):
    assert Version(PINNED[requirement.name.lower()]) in requirement.specifier


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_has_a_lower_bound_that_can_be_run(requirement):
    if requirement.name == "torchvision":
        pytest.skip("torchvision pins torch itself, one version each")
    assert re.match(r">=\d", str(requirement.specifier).split(",")[-1])


def test_every_pin_is_exact():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    assert all(line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def test_the_readme_installs_as_continuous_integration_does():
    line = 'pip install -c constraints.txt -e ".[dev]"'
    readme = (ROOT / "README.md").read_text()
    run = (ROOT / ".ci" / "run").read_text()
    assert line in readme
    assert line.replace("install -c", "install --quiet -c") in run
    assert "\npytest -q -n 2\n" in readme
    assert "\npytest -q -n 2\n" in run


def test_the_python_of_the_classifiers_is_the_required_one():
    minors = re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">=3.{min(map(int, minors))}"


def test_the_changelog_knows_the_version_or_what_comes_next():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## Unreleased" in text or f"## {vlm_steer.__version__}" in text


@pytest.mark.parametrize("group", ["vlm_steer.commands", "vlm_steer.methods"])
def test_every_entry_point_of_the_project_loads(group):
    declared = PROJECT["entry-points"].get(group, {})
    installed = {entry.name: entry for entry in entry_points(group=group)}
    for name, value in declared.items():
        assert installed[name].value == value
        assert callable(installed[name].load())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_and_source_file_of_a_document_exists(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    depends = re.search(r"^Depends on (.*)$", text, re.MULTILINE)
    sources = re.findall(r"`([^`]+)`", depends[1]) if depends else []
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_yaml_in_a_document_parses(path):
    for text in blocks(path, "yaml"):
        assert YAML(typ="safe", pure=True).load(text)


def test_the_example_of_the_readme_runs(capsys):
    (example,) = blocks(ROOT / "README.md", "python")
    exec(compile(example, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "Is there a dog in the image? ASSISTANT:" in shown
    assert "'pai': {'layers': {" in shown


def test_the_examples_about_the_mathematics_run_one_after_the_other():
    page = ROOT / "docs" / "functional.md"
    names: dict[str, object] = {}
    for example in blocks(page, "python"):
        exec(compile(example, page.name, "exec"), names)
    assert names["output"].shape == names["v"].shape


def test_the_examples_about_configuration_run_and_load(tmp_path, monkeypatch):
    from vlm_steer.config import resolve

    page = ROOT / "docs" / "configuration.md"
    monkeypatch.chdir(tmp_path)
    for example in blocks(page, "python"):
        exec(compile(example, page.name, "exec"), {})
    for text in blocks(page, "yaml"):
        Path("mine.yaml").write_text(text)
        assert [method.name for method in resolve("mine.yaml")] == ["pai", "vcd"]
