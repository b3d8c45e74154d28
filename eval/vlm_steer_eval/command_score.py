"""Commands that score answers and captions from files."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_steer.commands.options import (
    Seed,
)

from .command_options import (
    Missing,
    NormaliserOption,
    OutputFolder,
    ParserOption,
    Resamples,
    Synonyms,
    UnknownImages,
)

__all__ = ["score_chair", "score_pope"]


def score_pope(
    questions: Annotated[Path, typer.Option("--questions", help="POPE file with labels.")],
    answers: Annotated[
        Path,
        typer.Option("--answers", help="Rows with question_id and answer (or text)."),
    ],
    output: OutputFolder,
    parser: ParserOption = "robust",
    missing: Annotated[
        Missing, typer.Option("--missing", help="Questions without an answer.")
    ] = "error",
    resamples: Resamples = 10_000,
    seed: Seed = 0,
) -> None:
    """Score yes/no answers against a POPE file, joined by question id."""
    from . import scoring
    from .tables import metric_table, parser_line, render

    result = scoring.score_pope(
        questions,
        answers,
        parser=parser,
        output=output,
        missing=missing,
        n_resamples=resamples,
        seed=seed,
    )
    title = f"POPE, parser {parser}, n = {result['n']}"
    typer.echo(render(metric_table(result["metrics"], title)), nl=False)
    typer.echo(parser_line(result["parsers"], parser))
    if result["unanswered"]:
        _note(f"{len(result['unanswered'])} questions without an answer were left out")
    if result["unused_answers"]:
        _note(f"{result['unused_answers']} answers belong to no question of {questions}")
    unparsed = result["metrics"]["unparsed"]["value"]
    if parser == "spin" and unparsed:
        _note(
            f"{unparsed} answers were dropped; the original then pairs the answers after each with "
            "the wrong label, which joining by id does not repeat"
        )


def score_chair(
    captions: Annotated[Path, typer.Option("--captions", help="Rows with image_id and caption.")],
    output: OutputFolder,
    objects: Annotated[
        Path | None, typer.Option("--objects", help="Object sets per image, JSON or .gz.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="Folder of COCO annotations instead.")
    ] = None,
    synonyms: Synonyms = None,
    normaliser: NormaliserOption = "table",
    unknown_images: Annotated[
        UnknownImages | None,
        typer.Option(
            "--unknown-images",
            help="Captions of images without ground truth: error for table; opera counts them "
            "as images without objects, as published.",
        ),
    ] = None,
    resamples: Resamples = 10_000,
    seed: Seed = 0,
) -> None:
    """Score captions against the objects of their images."""
    from . import scoring
    from .tables import metric_table, render

    result = scoring.score_chair(
        captions,
        objects=objects,
        annotations=annotations,
        synonyms=synonyms,
        normaliser=normaliser,
        output=output,
        unknown_images=unknown_images,
        n_resamples=resamples,
        seed=seed,
    )
    title = f"CHAIR, normaliser {normaliser}"
    typer.echo(render(metric_table(result["metrics"], title)), nl=False)
    unknown = result["unknown_images"]
    if unknown["images"]:
        treated = {"empty": "counted as images without objects", "exclude": "left out"}
        _note(
            f"{len(unknown['images'])} images without ground truth were "
            f"{treated[unknown['policy']]}"
        )
    if result["empty_captions"]:
        _note(f"{result['empty_captions']} captions are empty and count as free of hallucination")
    if result["images_with_several_captions"]:
        _note(f"{result['images_with_several_captions']} images have more than one caption")


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)
