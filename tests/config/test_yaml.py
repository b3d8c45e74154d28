"""Files: where they are found, and what a reader of a broken one is told."""

import os
import random
from pathlib import Path

import pytest

from tests.config.conftest import Lens, Tilt
from vlm_steer.config import resolve
from vlm_steer.errors import ConfigError

pytestmark = pytest.mark.usefixtures("methods")

GOOD = """\
version: 1
methods:
  - method: lens      # first
    power: 1e-1
    layers: [2, null]
  - method: tilt
    degrees: 0o17
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file in the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "mine.yaml") -> str:
        data = text if isinstance(text, bytes) else text.encode()
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
        return name

    return write


def test_a_file_is_read_by_name_and_by_path(write):
    name = write(GOOD)
    expected = (Lens(power=0.1), Tilt(degrees=15))
    assert resolve(name) == expected
    assert resolve(Path(name)) == expected
    assert resolve(f"lens+{name}") == (Lens(), *expected)


def test_a_file_name_may_hold_a_plus(write):
    assert resolve(write("method: lens", "a+b.yml")) == (Lens(),)


def test_json_and_a_byte_order_mark_are_yaml(write):
    assert resolve(write(b'\xef\xbb\xbf{"method": "lens"}', "mine.json")) == (Lens(),)


def test_includes_come_first_and_are_relative_to_the_file(write):
    write("methods: [lens]", "parts/one.yaml")
    write("{method: tilt, degrees: 2}", "parts/two.yaml")
    name = write("include: [two.yaml, one.yaml]\nmethods: [lens]", "parts/all.yaml")
    assert resolve(name) == (Tilt(degrees=2), Lens(), Lens())


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("methods:\n  - method: lens\n    pwer: 1\n", 3, "unknown option 'pwer' for lens"),
        ("methods:\n  - method: lnes\n", 2, "unknown method 'lnes'. Did you mean 'lens'?"),
        ("methods:\n  - power: 1\n    method: lnes\n", 3, "unknown method 'lnes'"),
        ("methods:\n  - method: lens\n    count: 2\n    power: 99\n", 4, "power must lie in"),
        ('methods:\n  - method: lens\n    power: "0.5"\n', 3, "Remove the quotes"),
        ("methods:\n  - method: lens\n    power: no\n", 3, 'not the text "no"'),
        ("methods:\n  - method: lens\n    power: yes\n", 3, 'not the text "yes"'),
        ("methods:\n  - method: lens\n    power: true\n", 3, "not true"),
        ("methods:\n  - method: lens\n    power: .nan\n", 3, "not NaN"),
        ("methods:\n  - method: lens\n    power: 2026-01-02\n", 3, "power must be a number"),
        ("methods:\n  - method: lens\n    layers:\n      last: 0\n", 3, "is not a selector"),
        ("methods:\n  - method: lens\n\n    focus: 1.0\n", 4, "focus has no effect here"),
        ("methods:\n  - lens\n  - method: tilt\n", 3, "tilt needs degrees"),
        ("methods:\n  - lens\n  - 3\n", 3, "a method is a name, or a mapping"),
        ("methods:\n  - lens\n  - - lens\n", 3, "not a list"),
        ("methods:\n  - method: lens\n    3: 4\n", 3, "the key 3 must be text"),
        ("methods:\n  - method: [lens]\n", 2, "method must be a name, not a list"),
        ("\n\nmetods: [lens]\n", 3, "unknown key 'metods'. Did you mean 'methods'?"),
        ("version: 1\npower: 3\nmethods: []\n", 2, "options go under a method"),
        ("methods: [lens]\nversion: 2\n", 2, "version 2 is not known"),
        ("version: 1\n", 1, "the key methods is missing"),
        ("- method: lens\n", 1, "a configuration is a mapping with methods:, not a list"),
        ("lens\n", 1, 'a configuration is a mapping with methods:, not "lens"'),
        ("version: 1\nmethods:\n  method: lens\n", 2, "methods must be a list, not a mapping"),
        ("methods:\n", 1, "methods must be a list, not null"),
        ("methods:\n  - method: lens\n    power: 1\n    power: 2\n", 4, 'duplicate key "power"'),
        ("methods: [\n  lens\n", 3, "not valid YAML"),
        ("methods:\n  - method: lens\n   power: 1\n", 3, "not valid YAML"),
        ("methods:\n\t- lens\n", 2, "not valid YAML"),
        ("a: &x [1]\nmethods: *x\n", 2, "alias *x is not supported"),
        ("methods: &x\n  - *x\n", 2, "alias *x is not supported"),
        ("methods:\n  - !!python/name:os.system lens\n", 2, "not valid YAML"),
        ("methods: [lens]\n---\nmethods: [lens]\n", 2, "not valid YAML"),
        ("methods: [lens]\ninclude: [gone.yaml]\n", 2, "gone.yaml does not exist"),
        ("methods: [lens]\ninclude:\n  - 3\n", 3, "include lists file names, not 3"),
        ("include: gone.yaml\n", 1, 'include must be a list, not "gone.yaml"'),
    ],
)
def test_a_broken_file_is_reported_with_its_line(write, text, line, message):
    name = write(text)
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"{name}:{line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"null\n", "is empty"),
        (b"\xff\xfe\x00m", "not UTF-8"),
        (b"methods: \x01", "not valid YAML"),
        (b"[" * 2_000, "nested too deeply"),
        (b"method: lens\npower: 2026-13-99\n", "month must be in"),
        (b"? [a, b]\n: 1\n", "must be text"),
        (b"? {a: b}\n: 1\n", ""),
    ],
)
def test_a_file_that_is_no_configuration_is_named(write, data, message):
    name = write(data)
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"{name}:")
    assert message in str(caught.value)


def test_an_included_file_is_blamed_for_its_own_mistakes(write):
    write("\nmethods:\n  - method: lens\n    pwer: 1\n", "part.yaml")
    name = write("include: [part.yaml]\n")
    with pytest.raises(ConfigError, match=r"^part\.yaml:4: unknown option 'pwer'"):
        resolve(name)


def test_includes_do_not_nest(write):
    write("include: [mine.yaml]\n", "part.yaml")
    name = write("include: [part.yaml]\n")
    with pytest.raises(ConfigError, match=r"^part\.yaml:1: an included file cannot include"):
        resolve(name)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read: No such file"):
        resolve(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        resolve(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(write):
    name = write(GOOD)
    Path(name).chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        resolve(name)


def test_a_file_with_random_damage_loads_or_is_reported(write):
    """Every single-byte deletion and 200 random replacements of a good file."""
    data, dice = GOOD.encode(), random.Random(0)
    damaged = [data[:i] + data[i + 1 :] for i in range(len(data))]
    for _ in range(200):
        i = dice.randrange(len(data))
        damaged.append(data[:i] + bytes([dice.randrange(256)]) + data[i + 1 :])
    reported = 0
    for text in damaged:
        name = write(text)
        try:
            resolve(name)
        except ConfigError as error:
            reported += str(error).startswith(f"{name}:")
            continue
    assert reported > 100
