"""The page of official flags names only what exists here."""

import re
from pathlib import Path

import pytest
import typer

from vlm_steer.cli import build_app
from vlm_steer.config import describe, list_presets, resolve
from vlm_steer.registry import get_method, list_methods

PAGE = Path(__file__).parents[2] / "docs" / "from-official-code.md"


def _cells():
    """The middle and right cells of every row, with their row."""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if line.startswith("|") and len(cells) == 3 and not set(cells[0]) <= set("- "):
            yield line, cells[1], cells[2]


def _commands(group, path=()):
    """Path of every command -> its options."""
    for name, command in getattr(group, "commands", {}).items():
        yield from _commands(command, (*path, name))
    if not hasattr(group, "commands"):
        yield path, {option for parameter in group.params for option in parameter.opts}


def test_every_method_option_on_the_page_exists_with_that_value():
    seen = set()
    for line, here, note in _cells():
        for name, option, value in re.findall(r"`(\w+)\.(\w+)(?:: ([^`]+))?`", f"{here} {note}"):
            assert name in list_methods(), line
            assert option in {o.name for o in describe(get_method(name))}, line
            if value:
                resolve_text = f"{{method: {name}, {option}: {value}}}"
                assert _resolves(resolve_text, name), line
            seen.add(name)
    assert {"vcd", "pai", "var", "opera", "sid", "vista", "spin", "memvr"} <= seen


def _resolves(text, name):
    from vlm_steer._yaml import parse_yaml

    data, _ = parse_yaml(text, "the page")
    (method,) = resolve(data)
    return method.name == name


def test_every_command_option_on_the_page_exists():
    commands = dict(_commands(typer.main.get_command(build_app())))
    everything = set().union(*commands.values())
    for line, here, note in _cells():
        for text in re.findall(r"`([^`]+)`", here):
            options = set(re.findall(r"(?<![\w-])--[a-z-]+", text))
            assert options <= everything, line
            if text.startswith("vlm-steer "):
                path = tuple(text.split()[1:3])
                assert options <= commands[path], line
        assert set(re.findall(r"`(--[a-z-]+)`", note)) - {"--use-cfg"} <= everything, line


def test_every_preset_on_the_page_exists():
    known = {*list_presets(), *list_methods()}
    names = set()
    for line, here, note in _cells():
        for name in re.findall(r"presets? `(\w+)`", note) + re.findall(r"^`(\w+)`$", here):
            assert name in known, line
            names.add(name)
    assert {"var_official", "sid_official", "vcd"} <= names


@pytest.mark.parametrize(
    ("option", "preset"),
    [
        ("memvr.layers", "memvr_official"),
        ("deco.layers", "deco_llava"),
        ("vista.early", "vista_llava"),
    ],
)
def test_layers_on_the_page_are_those_of_the_preset_for_the_same_model(option, preset):
    (method,) = resolve(preset)
    written = list(getattr(method, option.split(".")[1]))
    assert f"`{option}: {written}`" in PAGE.read_text()


@pytest.mark.parametrize("path", ["docs/evaluation.md", "README.md"])
def test_the_page_is_linked(path):
    assert "from-official-code.md" in (PAGE.parents[1] / path).read_text()
