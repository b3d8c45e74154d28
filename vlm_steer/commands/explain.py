"""``vlm-steer explain``: an answer taken apart. Nothing heavy is imported here."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_steer.commands.groups import Loading, spelled_out
from vlm_steer.commands.options import (
    MaxNewTokens,
    Overrides,
    Seed,
)
from vlm_steer.commands.places import check_file, check_folder

if TYPE_CHECKING:
    from vlm_steer.explanation import ExplainResult

__all__ = ["register"]

_SHOWN = 12


def register(app: typer.Typer) -> None:
    """Put the command on the application."""
    app.command(
        epilog="Example: vlm-steer explain photo.jpg -p 'What is here?' --model tiny "
        "--method pai --detector logprob --html out.html"
    )(explain)


@spelled_out()
def explain(
    loading: Loading,
    images: Annotated[list[Path], typer.Argument(help="An image file, or several for one prompt.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask about them.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Folder or hub name of a vision-language model; 'tiny' is the embedded one.",
            rich_help_panel="Model",
        ),
    ] = "tiny",
    method: Annotated[
        str, typer.Option("--method", help="A method, a preset, a YAML file, or several with '+'.")
    ] = "none",
    overrides: Overrides = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector", help="A detector, or the folder of a fitted one. Repeatable. [logprob]"
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the page, a file that needs nothing else.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write everything to, as JSON.")
    ] = None,
    checks: Annotated[
        int,
        typer.Option(
            "--checks", min=0, help="How many of the riskiest words to check by knockout."
        ),
    ] = 6,
    check: Annotated[
        list[str] | None,
        typer.Option("--check", help="Check this word instead of the riskiest. Repeatable."),
    ] = None,
    check_share: Annotated[
        float, typer.Option("--check-share", help="Image tokens that a check cuts off, a fraction.")
    ] = 0.1,
    lens: Annotated[
        bool,
        typer.Option("--lens/--no-lens", help="Read every word off every layer; takes longer."),
    ] = True,
    num_beams: Annotated[int, typer.Option(min=1, help="Width of beam search.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature; 0 does not sample.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show where each word of an answer looked, how risky it is, and whether looking mattered."""
    from vlm_steer.config import apply_overrides, resolve
    from vlm_steer.images import open_image

    methods = apply_overrides(resolve(method), overrides or [])
    pictures = [open_image(image) for image in images]
    if html is not None:
        check_file(html, "--html", example="out.html")
    if output is not None:
        check_folder(output)
    if model == "tiny":
        typer.echo("The embedded model 'tiny' answers; --model gives another.", err=True)

    from vlm_steer.commands.generate import Decoding
    from vlm_steer.explanation import explain as run
    from vlm_steer.generation import halving

    loaded, processor = loading.load(model)
    decoding = Decoding(max_new_tokens, num_beams, temperature, seed)

    def work(prompts: Sequence[str]) -> list["ExplainResult"]:
        return [
            run(
                loaded,
                processor,
                pictures,
                asked,
                methods=methods or None,
                detectors=tuple(detector or ["logprob"]),
                checks=check or checks,
                check_share=check_share,
                lens=lens,
                seed=seed,
                provenance={"weights": model, "files": [image.name for image in images]},
                **decoding.options(),
            )
            for asked in prompts
        ]

    # A single item cannot be halved; this only words the error when memory runs out.
    ((result,), _) = halving(work, [prompt], 1, lambda _: None)
    if html is not None:
        result.to_html(html)
    if output is not None:
        (output / "explain.json").write_text(result.to_json() + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(_summary(result), indent=2, ensure_ascii=False))
    else:
        _show(result, html)


def _summary(result: "ExplainResult") -> dict[str, Any]:
    return {
        "text": result.text,
        "arms": {arm.name: arm.trace.text for arm in result.arms},
        "why_no_map": result.why_no_map,
        "words": [
            {
                "text": word.text,
                "span": list(word.span),
                "position": result.arm.position[number],
                "risk": {name: risks[number] for name, risks in result.risk.items()},
                "check": _check(result, number),
            }
            for number, word in enumerate(result.words)
        ],
        "provenance": dict(result.provenance),
    }


def _check(result: "ExplainResult", number: int) -> dict[str, Any] | None:
    from vlm_steer.explanation.payload import check_payload

    check = result.arm.checks.get(number)
    return None if check is None else check_payload(check)


def _show(result: "ExplainResult", html: Path | None) -> None:
    """The answers, and the riskiest words with their checks."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, soft_wrap=True)
    for arm in result.arms:
        console.print(f"{arm.name}: {arm.trace.text.strip()}")
    name = next(iter(result.risk))
    risks = result.risk[name]
    order = sorted(range(len(risks)), key=lambda number: -risks[number])
    table = Table("word", name, "words before", "log p", "without its cells", "without others")
    for number in order[:_SHOWN]:
        table.add_row(*_row(result, number, risks))
    console.print(table)
    if result.why_no_map:
        console.print(f"No heat map: {result.why_no_map}")
    if html is not None:
        console.print(f"{html}: {html.stat().st_size / 1e6:.2f} MB")


def _row(result: "ExplainResult", number: int, risks: Sequence[float]) -> tuple[str, ...]:
    word, arm = result.words[number], result.arm
    logprob = float(arm.trace.logprob[slice(*word.tokens)].sum())
    check = arm.checks.get(number)
    cut = ("", "") if check is None else (check.without_cells, check.without_others)
    numbers = (risks[number], arm.position[number], logprob, *cut)
    return (word.text, *map(_shown, numbers))


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "ruled out" if value == -math.inf else f"{value:.3g}"
