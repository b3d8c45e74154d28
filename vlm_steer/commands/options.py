"""Options that several commands share, so that they are spelled and explained once.

``def command(model: ModelName, dtype: Dtype = "auto", ...)``. Nothing here imports torch.
"""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

__all__ = [
    "Attn",
    "BatchSize",
    "DeviceMap",
    "Dtype",
    "DtypeName",
    "Limit",
    "MaxNewTokens",
    "ModelName",
    "Output",
    "Overrides",
    "Quantization",
    "QuantizationName",
    "Revision",
    "Seed",
]

DtypeName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationName: TypeAlias = Literal["8bit", "4bit"]

_MODEL = "Model"

ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="Folder or hub name of a vision-language model; 'tiny' is the embedded one.",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[
    DtypeName, typer.Option("--dtype", help="Type of the weights.", rich_help_panel=_MODEL)
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="auto, cuda, cuda:1, ...; the CPU when omitted.",
        rich_help_panel=_MODEL,
    ),
]
Quantization = Annotated[
    QuantizationName | None,
    typer.Option(
        "--quantization",
        help="Load weights in fewer bits (needs bitsandbytes).",
        rich_help_panel=_MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Commit or tag of a hub model.", rich_help_panel=_MODEL),
]
Attn = Annotated[
    str | None,
    typer.Option(
        "--attn", help="Attention implementation, such as sdpa or eager.", rich_help_panel=_MODEL
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        min=1,
        help="Rows at once; halved when memory runs out.",
        rich_help_panel=_MODEL,
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N samples.")]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=1, help="Longest answer, in tokens.", rich_help_panel=_MODEL
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one option, such as var.keep=0.5. Repeatable."),
]
Output = Annotated[
    Path | None, typer.Option("--output", help="Folder to write the results to, as JSON.")
]
