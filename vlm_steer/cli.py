"""The ``vlm-steer`` command.

Torch and transformers load inside the commands, so that help is instant. Other packages add
commands through the entry-point group ``vlm_steer.commands``: each entry is a function that takes
the application and registers its commands on it, and whose module imports nothing heavy.
"""

import json
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from vlm_steer import __version__
from vlm_steer.commands import build, explain
from vlm_steer.commands.groups import Loading, spelled_out
from vlm_steer.commands.options import (
    BatchSize,
    Limit,
    MaxNewTokens,
    ModelName,
    Output,
    Overrides,
    Seed,
)
from vlm_steer.commands.places import check_file, check_folder
from vlm_steer.errors import ConfigError, SteerError, SteerWarning

__all__ = ["build_app", "main"]

COMMANDS_GROUP = "vlm_steer.commands"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    command = typer.main.get_command(build_app())
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            command(args=arguments, prog_name="vlm-steer")
        except ConfigError as error:
            _fail(error, 2)
        except SteerError as error:
            _fail(error, 1)


def build_app() -> typer.Typer:
    """The application with its own commands and those of installed packages."""
    app = typer.Typer(
        name="vlm-steer",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    app.command(epilog="Example: vlm-steer methods var")(methods)
    app.command(epilog="Example: vlm-steer models --check tiny")(models)
    app.command(epilog="Example: vlm-steer calibrate act --model tiny --output heads.json")(
        calibrate
    )
    app.command(
        epilog="Example: vlm-steer generate --model tiny --image photo.jpg "
        "--prompt 'Is there a dog?' --method var --compare"
    )(generate)
    explain.register(app)
    build.register(app)
    for entry in entry_points(group=COMMANDS_GROUP):
        try:
            register = entry.load()
        except (ImportError, AttributeError) as error:
            typer.echo(
                f"Warning: the commands of {entry.name!r} ({entry.value}) are missing: {error}",
                err=True,
            )
            continue
        register(app)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Make vision-language models look at their image, and measure whether they do."""


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method, to see its options, or a preset.")
    ] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option(help="Print the table of the README.")] = False,
) -> None:
    """List the methods and presets, or explain one of them."""
    from dataclasses import asdict

    from vlm_steer.commands import catalog, tables
    from vlm_steer.config import dump, find_preset, list_presets, resolve
    from vlm_steer.registry import list_methods

    if markdown:
        typer.echo(catalog.markdown_table())
    elif name in list_presets() and name not in list_methods():
        if as_json:
            _print_json(dump(resolve(name)))
        else:
            typer.echo(find_preset(name).read_text(encoding="utf-8"), nl=False)
    elif name is not None:
        entry = catalog.entry(name)
        _print_json(asdict(entry)) if as_json else tables.show_method(entry)
    else:
        entries, presets = catalog.entries(), list_presets()
        if as_json:
            _print_json({"methods": [asdict(entry) for entry in entries], "presets": presets})
        else:
            tables.show_methods(entries, presets)


@spelled_out()
def models(
    loading: Loading,
    check: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a model: load it and attach every method."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="With --check: attach this instead of every method.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how model families can be steered, or check what can be done with a model."""
    from vlm_steer.commands import models as about
    from vlm_steer.commands import tables

    if check is None:
        seen = about.checked()
        _print_json(seen) if as_json else tables.show_families(seen)
        return
    from vlm_steer.config import resolve
    from vlm_steer.registry import list_methods

    specs = {name: resolve(name) for name in ([method] if method else list_methods())}
    model, processor = loading.load(check)
    report = about.check(model, processor, specs)
    _print_json(report) if as_json else tables.show_check(report)


@spelled_out()
def generate(
    loading: Loading,
    model: ModelName,
    image: Annotated[list[Path], typer.Option("--image", help="An image file. Repeatable.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask about each image.")],
    method: Annotated[
        str, typer.Option("--method", help="A method, a preset, a YAML file, or several with '+'.")
    ] = "none",
    overrides: Overrides = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer without the method too, side by side.")
    ] = False,
    num_beams: Annotated[int, typer.Option(min=1, help="Width of beam search.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature; 0 does not sample.")
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model about images, with or without steering."""
    from vlm_steer.commands import tables
    from vlm_steer.config import apply_overrides, dump, resolve
    from vlm_steer.images import open_image

    steered = apply_overrides(resolve(method), overrides or [])
    pictures = [open_image(path) for path in image]
    if output is not None:
        check_folder(output)

    from vlm_steer.commands.generate import Decoding, answer

    loaded, processor = loading.load(model)
    decoding = Decoding(max_new_tokens, num_beams, temperature, seed)
    arms = {"none": (), method: steered} if compare else {method: steered}
    answers = {
        arm: answer(
            loaded,
            processor,
            pictures,
            prompt,
            methods=chosen,
            decoding=decoding,
            batch_size=batch_size,
        )
        for arm, chosen in arms.items()
    }
    report = {
        "model": model,
        "prompt": prompt,
        "images": [str(path) for path in image],
        "configuration": dump(steered),
        "answers": {arm: given.texts for arm, given in answers.items()},
        "effects": answers[method].effects,
    }
    if output is not None:
        (output / "generate.json").write_text(json.dumps(report, indent=2) + "\n")
    _print_json(report) if as_json else tables.show_answers(report, compare=compare)


@spelled_out()
def calibrate(
    loading: Loading,
    method: Annotated[str, typer.Argument(help="A method that is calibrated per model.")],
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", help="The JSON file to write.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="JSON lines with image, question and answer, apart from any test set; "
            "embedded scenes when omitted.",
        ),
    ] = None,
    limit: Limit = 64,
    overrides: Overrides = None,
    max_new_tokens: MaxNewTokens = 4,
    batch_size: BatchSize = 32,
    as_json: AsJson = False,
) -> None:
    """Choose what a method needs to know about a model, such as the heads that ACT acts on."""
    from vlm_steer.config import apply_overrides, resolve

    found = apply_overrides(resolve(method), overrides or [])
    if len(found) != 1:
        raise ConfigError(f"{method!r} is {len(found)} methods. Give one, such as act.")
    (chosen,) = found
    check_file(output, example="heads.json")

    from vlm_steer.calibration import write_calibration
    from vlm_steer.commands.calibrate import calibrate as run
    from vlm_steer.commands.calibrate import embedded_samples, read_samples
    from vlm_steer.engine.model import inspect_model

    samples = embedded_samples(limit) if data is None else read_samples(data, limit)
    loaded, processor = loading.load(model)
    result = run(
        loaded, processor, chosen, samples, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    write_calibration(output, chosen.name, inspect_model(loaded), result)
    if as_json:
        _print_json(result)
    else:
        typer.echo(f"{output}: {result['candidates']} candidates tried on {len(samples)} samples.")


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"Error: {error}", err=True)
    sys.exit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001 - the signature of warnings.showwarning
    line: str | None = None,
) -> None:
    """Our own warnings as a sentence, all others as Python shows them."""
    if issubclass(category, SteerWarning):
        typer.echo(f"Warning: {message}", err=True)
    else:
        typer.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True)
