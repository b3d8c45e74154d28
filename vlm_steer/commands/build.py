"""``vlm-steer build``: files that methods need, made from data. Nothing heavy is imported here."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm_steer.commands.groups import Loading, spelled_out
from vlm_steer.commands.options import (
    BatchSize,
    Limit,
    MaxNewTokens,
    ModelName,
)
from vlm_steer.commands.places import check_file
from vlm_steer.errors import ConfigError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Put the command on the application."""
    group = typer.Typer(no_args_is_help=True)
    group.command(
        epilog="Example: vlm-steer build vti --model tiny --pairs pairs.jsonl --images photos "
        "--output directions.safetensors"
    )(vti)
    group.command(
        epilog="Example: vlm-steer build decore --model tiny --image photos --output heads.json"
    )(decore)
    app.add_typer(group, name="build", help="Make files that methods need, such as directions.")


@spelled_out()
def vti(
    loading: Loading,
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
    visual_trials: Annotated[
        int,
        typer.Option(
            "--visual-trials",
            min=0,
            help="Random masks per image for the directions of the vision tower; 0 for none. The "
            "authors use 50.",
        ),
    ] = 0,
    mask: Annotated[
        float, typer.Option("--mask", help="Share of the patches that each mask hides, in (0, 1].")
    ] = 0.99,
    limit: Limit = None,
    batch_size: BatchSize = 1,
) -> None:
    """Make the directions of vti from pairs of correct and hallucinated captions."""
    _refuse_output(output, ".safetensors")
    if not 0 < mask <= 1:
        raise ConfigError(f"--mask {mask} is no share; give a number above 0 and at most 1.")
    from vlm_steer.commands import directions

    found = directions.read_pairs(pairs, images)[:limit]
    loaded, processor = loading.load(model)
    made = directions.from_pairs(
        loaded,
        processor,
        found,
        form=form,
        batch_size=batch_size,
        visual_trials=visual_trials,
        mask_share=mask,
    )
    made.save(output)
    layers, hidden = made.vectors.shape
    typer.echo(f"{output}: {layers} directions of {hidden}, from {len(found)} pairs.")
    if made.visual is not None:
        layers, hidden = made.visual.shape
        typer.echo(
            f"and {layers} of {hidden} for the vision tower, from {visual_trials} masks each."
        )


@spelled_out()
def decore(
    loading: Loading,
    model: ModelName,
    images: Annotated[
        list[Path], typer.Option("--image", help="An image file, or a folder of them. Repeatable.")
    ],
    output: Annotated[
        Path, typer.Option("--output", help="File to write, FILE.json. Not overwritten.")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", help="What to ask about each image.")
    ] = "Describe this image in detail.",
    limit: Limit = None,
    batch_size: BatchSize = 1,
    max_new_tokens: MaxNewTokens = 32,
) -> None:
    """Score attention heads by how often they look at the image while the model answers."""
    _refuse_output(output, ".json")
    from vlm_steer.commands import head_scores
    from vlm_steer.heads import write_head_scores

    files = head_scores.image_files(images)[:limit]
    loaded, processor = loading.load(model)
    scores = head_scores.visual_heads(
        loaded,
        processor,
        files,
        prompt,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    write_head_scores(output, scores)
    (layer, head), best = max(scores.items(), key=lambda item: sum(item[1]))
    typer.echo(
        f"{output}: {len(scores)} heads on {len(files)} images; head {layer}-{head} looks at the "
        f"image for {sum(best) / len(best):.0%} of the tokens."
    )


def _refuse_output(output: Path, suffix: str) -> None:
    if output.suffix != suffix:
        raise ConfigError(f"--output {output} does not end in {suffix}.")
    if output.exists():
        raise ConfigError(f"--output {output} exists already. Remove it or choose another name.")
    check_file(output, example=f"out{suffix}")
