"""``vlm-steer build``: files that methods need, made from data. Nothing heavy is imported here."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm_steer.commands.options import (
    Attn,
    BatchSize,
    DeviceMap,
    Dtype,
    Limit,
    ModelName,
    Quantization,
    Revision,
)

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Put the command on the application."""
    group = typer.Typer(no_args_is_help=True)
    group.command(
        epilog="Example: vlm-steer build vti --model tiny --pairs pairs.jsonl --images photos "
        "--output directions.safetensors"
    )(vti)
    app.add_typer(group, name="build", help="Make files that methods need, such as directions.")


def vti(
    model: ModelName,
    pairs: Annotated[
        Path,
        typer.Option(
            "--pairs",
            help="JSON lines with image, question, value (a correct caption) and h_value (a "
            "hallucinated one).",
        ),
    ],
    images: Annotated[Path, typer.Option("--images", help="Folder of the images.")],
    output: Annotated[
        Path, typer.Option("--output", help="File to write, FILE.safetensors. Not overwritten.")
    ],
    form: Annotated[
        Literal["mean_plus_component", "mean"],
        typer.Option(
            "--form",
            help="Direction: the mean difference plus its first principal component (official "
            "code), or the mean alone.",
        ),
    ] = "mean_plus_component",
    limit: Limit = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    revision: Revision = None,
    attn: Attn = None,
) -> None:
    """Make the directions of vti from pairs of correct and hallucinated captions."""
    from vlm_steer.commands import directions
    from vlm_steer.errors import ConfigError

    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output} does not end in .safetensors.")
    if output.exists():
        raise ConfigError(f"--output {output} exists already. Remove it or choose another name.")
    found = directions.read_pairs(pairs, images)[:limit]

    from vlm_steer.loading import load_model

    loaded, processor = load_model(
        model,
        dtype=dtype,
        device_map=device_map,
        quantization=quantization,
        revision=revision,
        attn=attn,
    )
    made = directions.from_pairs(loaded, processor, found, form=form, batch_size=batch_size)
    made.save(output)
    layers, hidden = made.vectors.shape
    typer.echo(f"{output}: {layers} directions of {hidden}, from {len(found)} pairs.")
