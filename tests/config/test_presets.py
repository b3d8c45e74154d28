"""The configurations that come with the package."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from vlm_steer.config import describe, dump, find_preset, list_presets, resolve
from vlm_steer.errors import ConfigError
from vlm_steer.registry import get_method, list_methods

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_checkout_offers_its_own_configs():
    assert list_presets() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert find_preset("var") == CONFIGS / "var.yaml"


@pytest.mark.parametrize("name", list_methods())
def test_every_method_has_one_file_that_equals_its_defaults(name):
    (method,) = resolve(CONFIGS / f"{name}.yaml")
    assert type(method) is get_method(name)
    assert method == get_method(name)()


@pytest.mark.parametrize("name", list_methods())
def test_the_file_of_a_method_writes_every_option_under_a_comment(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    options = [option.name for option in describe(get_method(name))]
    idle = get_method(name)().ignored_options()  # under the defaults; writing them is an error
    for option in options:
        start = f"    # {option}:" if option in idle else f"    {option}:"
        (at,) = [i for i, line in enumerate(lines) if line.startswith(start)]
        assert lines[at - 1].startswith("    # "), f"{option} stands without a comment"


@pytest.mark.parametrize("name", list_methods())
def test_every_option_of_a_method_is_documented_in_its_class(name):
    assert [o.name for o in describe(get_method(name)) if not o.doc] == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_loads_and_survives_a_round_trip(path):
    methods = resolve(path)
    assert methods
    assert resolve(dump(methods)) == methods
    assert resolve(path.stem) == methods
    assert YAML(typ="safe", pure=True).load(path)["version"] == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_starts_with_what_it_is(path):
    assert path.suffix == ".yaml"
    assert re.match(r"# .{20}", path.read_text())


def test_var_official_keeps_what_the_paper_moves():
    (method,) = resolve("var_official")
    assert (method.keep, method.skip_last, method.layers) == (0.6, False, (2, None))


def test_a_preset_is_found_by_file_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("pai_vcd.yaml") == resolve("pai_vcd")


def test_a_file_in_the_working_directory_wins_over_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "var.yaml").write_text("{method: var, keep: 0.9}")
    (method,) = resolve("var.yaml")
    assert method.keep == 0.9
    assert resolve("var") == (get_method("var")(),)


def test_an_unknown_preset_is_told_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'var_official'"):
        find_preset("var_oficial")


def test_options_that_only_layers_know_are_no_options_of_a_logits_method():
    assert {"layers", "scope"}.isdisjoint(option.name for option in describe(get_method("vcd")))
    with pytest.raises(ConfigError, match="layers has no effect here: vcd acts on"):
        resolve({"method": "vcd", "layers": [0, 4]})
