"""``vlm-steer bench``: what steering costs on this machine."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["register"]

_ROW = "| `{arm}` | {image_tokens} | {prefill:.2f} | {decode:.2f} | {memory:.2f} | {timings} |"


def register(app: typer.Typer) -> None:
    """Add ``bench`` to the application."""
    bench = typer.Typer(help="Measure what steering costs on this machine.", no_args_is_help=True)
    bench.command(
        epilog="Example: vlm-steer bench overhead --image-tokens 576 --image-tokens 2304"
    )(overhead)
    bench.command(epilog="Example: vlm-steer bench rows --tokens 640 --tokens 2400")(rows)
    app.add_typer(bench, name="bench")


def overhead(
    methods: Annotated[
        str, typer.Option(help="Arms to measure, separated by commas; every method by default.")
    ] = "",
    image_tokens: Annotated[
        list[int] | None, typer.Option(help="Image tokens of the prompt; may be given twice.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Size of the random LLaVA: small or 7b.")] = "small",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded per timing.", min=2)] = 24,
    repeats: Annotated[int, typer.Option(help="Timings per setting.", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    attn: Annotated[
        list[str] | None,
        typer.Option(help="Attention below the steering: sdpa or eager; may be given twice."),
    ] = None,
    clock: Annotated[
        str,
        typer.Option(help="wall; or cpu, the work of a single thread, where others compute too."),
    ] = "wall",
    output: Annotated[
        Path | None, typer.Option(help="Folder for overhead.json and .md, kept up to date.")
    ] = None,
) -> None:
    """Time and memory of every method, as ratios to the unsteered model in the same run."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from vlm_steer.errors import ConfigError
    from vlm_steer_eval.bench.overhead import as_rows, every_arm, measure_overhead

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype {dtype}: write one of {', '.join(dtypes)}.")
    unknown = [name for name in attn or () if name not in ("sdpa", "eager")]
    if unknown:
        raise ConfigError(f"--attn {unknown[0]}: write sdpa or eager.")
    if clock not in ("wall", "cpu"):
        raise ConfigError(f"--clock {clock}: write wall or cpu.")
    if clock == "cpu" and (device != "cpu" or torch.get_num_threads() > 1):
        raise ConfigError(
            "--clock cpu counts the work of one thread on the CPU. Set OMP_NUM_THREADS=1 and leave "
            "--device alone, or use --clock wall."
        )
    facts: dict[str, Any] = {
        "shape": shape,
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "clock": clock,
        "torch": torch.__version__,
        "new_tokens": new_tokens,
        "costs": [],
    }
    table = Table(title="Ratios to the unsteered model (sdpa) in the same run")
    for column in ("setting", "attention", "image tokens", "prefill", "decode", "memory"):
        table.add_column(column, justify="left" if column in ("setting", "attention") else "right")
    for tokens in image_tokens or [576]:
        for cost in measure_overhead(
            methods.split(",") if methods else every_arm(),
            shape=shape,
            image_tokens=tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            device=device,
            dtype=dtypes[dtype],
            attention=attn or ["sdpa"],
            now=time.thread_time if clock == "cpu" else time.perf_counter,
        ):
            ratios = (f"{value:.2f}" for value in (cost.prefill, cost.decode, cost.memory))
            table.add_row(cost.arm, cost.attention, str(cost.image_tokens), *ratios)
            facts["costs"] += as_rows([cost])
            if output is not None:
                _write(facts, output)
    Console().print(table)


def _write(facts: dict[str, Any], output: Path) -> None:
    """Write what was measured so far."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "overhead.json"
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (output / "overhead.md").write_text(_markdown(facts), encoding="utf-8")


def rows(
    tokens: Annotated[
        list[int] | None, typer.Option(help="Length of the prompt; may be given twice.", min=128)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timings of each.", min=1)] = 5,
) -> None:
    """One attention layer steered as published code does it, and as it is done here."""
    from rich.console import Console
    from rich.table import Table

    from vlm_steer_eval.bench.rows import measure_layer

    table = Table(title="Ratios to the stock kernel on the same tensors, 32 heads of 128")
    for column in ("method", "phase", "tokens", "published way", "here"):
        table.add_column(column, justify="left" if column in ("method", "phase") else "right")
    for length in tokens or [640]:
        for cost in measure_layer(length, repeats=repeats):
            ratios = (f"{cost.published:.2f}", f"{cost.here:.2f}")
            table.add_row(cost.method, cost.phase, str(cost.tokens), *ratios)
    Console().print(table)


def _markdown(facts: dict[str, Any]) -> str:
    """A table per attention below the steering, one row per setting and length."""
    lines = []
    for below in dict.fromkeys(cost["attention"] for cost in facts["costs"]):
        lines += [
            f"Over `{below}`, shape {facts['shape']}, {facts['dtype']}, {facts['device']} with "
            f"{facts['threads']} threads, {facts['clock']} clock, {facts['new_tokens']} tokens "
            "decoded per timing:",
            "",
            "| setting | image tokens | prefill | per decoded token | peak memory | timings |",
            "|---|--:|--:|--:|--:|--:|",
            *(_ROW.format(**cost) for cost in facts["costs"] if cost["attention"] == below),
            "",
        ]
    return "\n".join(lines)
