"""Help, exit codes and what a user is told."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer

import vlm_steer
from vlm_steer import cli
from vlm_steer.config import dump, find_preset, resolve
from vlm_steer.errors import ConfigError, DataError, SteerError, SteerWarning
from vlm_steer.registry import list_methods

HEAVY = ("torch", "transformers", "numpy", "PIL", "datasets", "matplotlib")

HELP_OF_EVERY_COMMAND = f"""
import sys
import typer
from vlm_steer.cli import build_app

def leaves(command, path):
    if not hasattr(command, "commands"):
        return [path]
    inner = command.commands.items()
    return [leaf for name, inside in inner for leaf in leaves(inside, [*path, name])]

command = typer.main.get_command(build_app())
paths = leaves(command, [])
for path in [[], *paths]:
    try:
        command(args=[*path, "--help"], prog_name="vlm-steer")
    except SystemExit as error:
        assert error.code == 0, path
loaded = [name for name in {HEAVY} if name in sys.modules]
print("COMMANDS", *(" ".join(path).replace(" ", "/") for path in paths))
print("LOADED", *loaded)
"""


def test_help_of_every_command_shows_an_example_and_loads_nothing_heavy():
    seen = subprocess.run(
        [sys.executable, "-c", HELP_OF_EVERY_COMMAND], capture_output=True, text=True, check=True
    )
    *pages, commands, loaded = seen.stdout.strip().splitlines()
    assert loaded == "LOADED"
    names = commands.split()[1:]
    assert {"generate", "methods", "models", "demo", "eval/pope", "score/chair"} <= set(names)
    assert "\n".join(pages).count("Example: vlm-steer") == len(names)


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, vlm_steer; print([n for n in {HEAVY} if n in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


def test_the_module_is_the_command():
    seen = subprocess.run(
        [sys.executable, "-m", "vlm_steer", "--version"], capture_output=True, text=True, check=True
    )
    assert seen.stdout.strip() == vlm_steer.__version__


def test_every_public_name_loads_and_is_listed():
    assert set(vlm_steer.__all__) <= set(dir(vlm_steer))
    for name in vlm_steer.__all__:
        assert getattr(vlm_steer, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'stear'"):
        vlm_steer.stear  # noqa: B018


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"{vlm_steer.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("genrate",),
        ("generate",),
        ("methods", "--jsn"),
        ("generate", "--model", "tiny", "--image", "a.png", "--prompt", "x", "--num-beams", "0"),
        ("generate", "--model", "tiny", "--image", "a.png", "--prompt", "x", "--dtype", "float8"),
        ("generate", "--model", "tiny", "--image", "a.png", "--prompt", "x", "--temperature", "-1"),
    ],
)
def test_bad_usage_exits_with_2_and_speaks_on_stderr(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert err if arguments else out


def test_a_wrong_command_is_told_the_nearest(run):
    assert "Did you mean 'generate'" in run("genrate").err


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("wrong option"), 2), (SteerError("went wrong"), 1), (DataError("bad file"), 1)],
)
def test_our_errors_are_one_line_and_an_exit_code(run, monkeypatch, error, code):
    def fail(_app: typer.Typer) -> None:
        @_app.command()
        def broken() -> None:
            raise error

    monkeypatch.setattr(cli, "entry_points", lambda group: (_Loaded(fail),))
    assert run("broken") == (code, "", f"Error: {error}\n")


def test_an_interruption_exits_with_130(run, monkeypatch):
    def interrupt(_app: typer.Typer) -> None:
        @_app.command()
        def slow() -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "entry_points", lambda group: (_Loaded(interrupt),))
    assert run("slow").code == 130


def test_other_errors_keep_their_traceback(monkeypatch):
    def register(_app: typer.Typer) -> None:
        @_app.command()
        def bug() -> None:
            raise ZeroDivisionError

    monkeypatch.setattr(cli, "entry_points", lambda group: (_Loaded(register),))
    with pytest.raises(ZeroDivisionError):
        cli.main(["bug"])


def test_our_warnings_are_one_line(run, monkeypatch):
    import warnings

    def register(_app: typer.Typer) -> None:
        @_app.command()
        def careless() -> None:
            warnings.warn("nothing was steered", SteerWarning, stacklevel=1)

    monkeypatch.setattr(cli, "entry_points", lambda group: (_Loaded(register),))
    assert run("careless") == (0, "", "Warning: nothing was steered\n")


def test_a_broken_plugin_is_named_and_the_rest_works(run, monkeypatch):
    broken = EntryPoint("plugin", "no_such_package_here:register", cli.COMMANDS_GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: (broken,))
    code, out, err = run("--version")
    assert (code, out.strip()) == (0, vlm_steer.__version__)
    assert "the commands of 'plugin' (no_such_package_here:register) are missing" in err


def test_methods_lists_all_methods_and_presets(run):
    code, out, _ = run("methods")
    assert code == 0
    assert all(name in out for name in (*list_methods(), "var_official", "pai_vcd"))


def test_methods_as_json_holds_every_option(run):
    data = json.loads(run("methods", "--json").out)
    assert [method["name"] for method in data["methods"]] == list_methods()
    (var,) = [method for method in data["methods"] if method["name"] == "var"]
    assert {key: var["options"][0][key] for key in ("name", "type", "default")} == {
        "name": "keep",
        "type": "a number",
        "default": 0.4,
    }


def test_a_narrow_terminal_cuts_no_name_off(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("methods", "halc")
    meanings = "".join(line.split("│")[4].strip() for line in out.splitlines() if "│" in line)
    assert "google/owlv2-base-patch16-ensemble" in meanings
    assert "…" not in out


def test_a_method_is_explained_with_its_options(run):
    code, out, _ = run("methods", "vhr")
    assert code == 0
    assert "2412.13949" in out
    assert "alpha" in out
    options = {
        option["name"]: option
        for option in json.loads(run("methods", "vhr", "--json").out)["options"]
    }
    assert options["layers"]["default"] == {"union": [{"indices": [1]}, {"last": 0.4375}]}


def test_a_preset_is_shown_as_its_file_and_as_data(run):
    assert run("methods", "pai_vcd").out == find_preset("pai_vcd").read_text()
    assert json.loads(run("methods", "pai_vcd", "--json").out) == dump(resolve("pai_vcd"))


def test_an_unknown_method_is_told_the_nearest(run):
    code, _, err = run("methods", "vaar")
    assert code == 2
    assert "Did you mean 'var'?" in err


def test_models_lists_the_families_of_transformers(run):
    seen = json.loads(run("models", "--json").out)
    assert seen["families"]["llava"]["attaches"]
    assert seen["transformers"] in run("models").out
    assert "llava" in run("models").out


def test_the_table_in_the_readme_is_up_to_date(run):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert run("methods", "--markdown").out.strip() in readme


class _Loaded:
    """An entry point that needs no installed package."""

    def __init__(self, register):
        self.register = register

    def load(self):
        return self.register


def test_nowhere_to_write_is_told_before_a_model_is_loaded(run, pictures, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("vlm_steer.loading.load_model", never)
    pairs, samples = tmp_path / "pairs.jsonl", tmp_path / "samples.jsonl"
    texts = {"question": "What?", "value": "a cat", "h_value": "a dog", "answer": "A cat"}
    for file in (pairs, samples):
        file.write_text(json.dumps({"image": str(pictures[0]), **texts}))
    commands = [
        ["build", "vti", "--pairs", pairs, "--images", "/", "--output", pairs / "d.safetensors"],
        ["build", "decore", "--image", pictures[0], "--output", pairs / "heads.json"],
        ["calibrate", "act", "--data", samples, "--output", pairs / "heads.json"],
        ["generate", "--image", pictures[0], "--prompt", "?", "--output", pairs / "out"],
    ]
    for command in commands:
        code, _, err = run(*command, "--model", "tiny")
        assert (code, f"cannot write to {pairs}" in err) == (1, True), command
    code, _, err = run(*commands[-1][:-1], pairs, "--model", "tiny")
    assert (code, "is a file. Give a folder" in err) == (2, True)
    code, _, err = run("calibrate", "act+pai", "--model", "tiny", "--output", tmp_path / "h.json")
    assert (code, "is 2 methods. Give one" in err) == (2, True)
    for file in (pairs, samples):
        file.write_bytes(b"\xff\xfe")
    for command in (commands[0][:-1], commands[2][:-1]):
        code, _, err = run(*command, tmp_path / f"new{command[1]}.safetensors", "--model", "tiny")
        assert (code, err.startswith("Error: ")) == (1, True)
