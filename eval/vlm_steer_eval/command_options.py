"""Options that the commands of the harness share."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

__all__ = [
    "Beams",
    "Columns",
    "Dataset",
    "DatasetSplit",
    "EmbeddedScenes",
    "ImageFolder",
    "Images",
    "Methods",
    "Missing",
    "NormaliserName",
    "NormaliserOption",
    "OutputFolder",
    "ParserName",
    "ParserOption",
    "Resamples",
    "ScenesName",
    "SkipBadImages",
    "Synonyms",
    "Temperature",
    "Tokens",
    "TopP",
    "UnknownImages",
]

ParserName: TypeAlias = Literal[
    "robust", "official", "opera", "vcd", "spin", "icd", "repope", "lmms_eval", "vlmevalkit"
]
NormaliserName: TypeAlias = Literal["table", "opera"]
Missing: TypeAlias = Literal["error", "exclude"]
UnknownImages: TypeAlias = Literal["error", "empty", "exclude"]
ScenesName: TypeAlias = Literal["iid", "broken", "validation"]

OutputFolder = Annotated[Path, typer.Option("--output", help="Folder for the results.")]
Methods = Annotated[
    str,
    typer.Option("--methods", help="Arms: a comma separates them, + composes. none is always run."),
]
Images = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Only N images, chosen by a seeded hash of their names."),
]
Tokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=1, help="Longest answer, in tokens.", rich_help_panel="Model"
    ),
]
Beams = Annotated[int, typer.Option("--num-beams", min=1, help="Width of beam search.")]
Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0.0, help="Above 0: sample, seeded per item."),
]
TopP = Annotated[float, typer.Option("--top-p", help="Nucleus of sampling, in (0, 1].")]
Resamples = Annotated[
    int, typer.Option("--resamples", min=1, help="Resamples of the intervals and tests.")
]
ParserOption = Annotated[ParserName, typer.Option("--parser", help="How answers are read.")]
NormaliserOption = Annotated[
    NormaliserName, typer.Option("--normaliser", help="How captions are read.")
]
Synonyms = Annotated[
    Path | None,
    typer.Option("--synonyms", help="CHAIR synonyms file: name, synonym, ... per line."),
]
EmbeddedScenes = Annotated[
    ScenesName, typer.Option("--scenes", help="Embedded scenes, where no other data is given.")
]
ImageFolder = Annotated[Path | None, typer.Option("--images", help="Folder of the images.")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Hub id, or folder, of a data set instead.")
]
Columns = Annotated[
    str | None, typer.Option("--columns", help="Columns of --dataset: role=column,role=column.")
]
DatasetSplit = Annotated[str, typer.Option("--dataset-split", help="Split of --dataset.")]
SkipBadImages = Annotated[
    bool,
    typer.Option("--skip-bad-images", help="Exit 0 although images had to be left out."),
]
