"""Commands that run benchmarks from their published files."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_steer.errors import ConfigError
from vlm_steer_eval.choices import AmberPart

from .groups import RunOptions, spelled_out
from .options import (
    AmberParserOption,
    AmberSimilarity,
    BeafParserOption,
    EmbeddedScenes,
    HallusionJudge,
    HallusionParserOption,
    ImageFolder,
    ImagesOnly,
    MmeParserOption,
    MmvpParserOption,
    ParserOption,
    QuestionFiles,
    RatingOption,
    SharePrefix,
    Suffix,
    TaskImages,
)
from .run import check_early, chosen_judge, refuse_on_scenes, required_folder, run_and_show

__all__ = [
    "eval_amber",
    "eval_beaf",
    "eval_hallusionbench",
    "eval_mme",
    "eval_mmhal",
    "eval_mmvp",
    "eval_sycophancy",
]


@spelled_out("amber", max_new_tokens=512)
def eval_amber(
    run: RunOptions,
    data: Annotated[
        Path, typer.Option("--data", help="The benchmark's data folder, with its query files.")
    ],
    images: TaskImages,
    part: Annotated[AmberPart, typer.Option("--part", help="What to ask.")] = "all",
    parser: AmberParserOption = "robust",
    similarity: AmberSimilarity = "exact",
    suffix: Suffix = "",
    share_prefix: SharePrefix = True,
) -> None:
    """Run AMBER: captions and yes/no questions about the same pictures."""
    from vlm_steer_eval.benchmarks.published import amber_task

    check_early(run)
    task = amber_task(
        data,
        images,
        part=part,
        parser=parser,
        similarity=similarity,
        limit=run.limit,
        seed=run.seed,
        suffix=suffix,
    )
    run_and_show(task, run, share_prefix=share_prefix)


@spelled_out("beaf", max_new_tokens=16)
def eval_beaf(
    run: RunOptions,
    questions: Annotated[
        Path,
        typer.Option("--questions", help="Rows with id, image, question, gt, orig_img, removed_q."),
    ],
    images: TaskImages,
    parser: BeafParserOption = "robust",
    suffix: Suffix = "",
    share_prefix: SharePrefix = True,
) -> None:
    """Run BEAF: the same questions before and after an object is taken out of the picture."""
    from vlm_steer_eval.benchmarks.beaf import beaf_task

    check_early(run)
    task = beaf_task(
        questions, images, parser=parser, limit=run.limit, seed=run.seed, suffix=suffix
    )
    run_and_show(task, run, share_prefix=share_prefix)


@spelled_out("mme", max_new_tokens=16)
def eval_mme(
    run: RunOptions,
    questions: Annotated[
        Path,
        typer.Option("--questions", help="Folder of TASK.txt: image, question, label, by tabs."),
    ],
    images: Annotated[Path, typer.Option("--images", help="Folder with a folder per task.")],
    parser: MmeParserOption = "robust",
    suffix: Suffix = "",
    remove: Annotated[
        str, typer.Option("--remove", help="End of every question to cut off first.")
    ] = "",
    share_prefix: SharePrefix = True,
) -> None:
    """Run MME: two yes/no questions about each picture, in fourteen tasks."""
    from vlm_steer_eval.benchmarks.published import mme_task

    check_early(run)
    task = mme_task(
        questions,
        images,
        parser=parser,
        limit=run.limit,
        seed=run.seed,
        suffix=suffix,
        remove=remove,
    )
    run_and_show(task, run, share_prefix=share_prefix)


@spelled_out("hallusionbench", max_new_tokens=128)
def eval_hallusionbench(
    run: RunOptions,
    questions: Annotated[Path, typer.Option("--questions", help="HallusionBench.json.")],
    images: TaskImages,
    parser: HallusionParserOption = "robust",
    images_only: ImagesOnly = False,
    judge: HallusionJudge = None,
    suffix: Suffix = "",
    share_prefix: SharePrefix = True,
) -> None:
    """Run HallusionBench, read by yes and no or by a judge."""
    from vlm_steer_eval.benchmarks.published import hallusion_task

    check_early(run)
    task = hallusion_task(
        questions,
        images,
        parser=parser,
        images_only=images_only,
        judge=None if judge is None else chosen_judge(judge, run.output),
        limit=run.limit,
        seed=run.seed,
        suffix=suffix,
    )
    run_and_show(task, run, share_prefix=share_prefix)


@spelled_out("mmhal", max_new_tokens=512)
def eval_mmhal(
    run: RunOptions,
    template: Annotated[
        Path, typer.Option("--template", help="The benchmark's response_template.json.")
    ],
    images: TaskImages,
    judge: Annotated[
        str, typer.Option("--judge", help="hf:MODEL, or endpoint:MODEL@URL; see score mmhal.")
    ],
    reading: RatingOption = "robust",
) -> None:
    """Run MMHal-Bench and let a judge rate the answers."""
    from vlm_steer_eval.benchmarks.published import mmhal_task

    check_early(run)
    rater = chosen_judge(judge, run.output)
    task = mmhal_task(template, images, rater, reading=reading, limit=run.limit, seed=run.seed)
    run_and_show(task, run)


@spelled_out("mmvp", max_new_tokens=32)
def eval_mmvp(
    run: RunOptions,
    questions: Annotated[Path, typer.Option("--questions", help="Questions.csv.")],
    images: TaskImages,
    parser: MmvpParserOption = "robust",
    suffix: Suffix = "",
) -> None:
    """Run MMVP: pairs of pictures that look alike to CLIP, with opposite answers."""
    from vlm_steer_eval.benchmarks.mmvp import mmvp_task

    check_early(run)
    task = mmvp_task(
        questions, images, parser=parser, limit=run.limit, seed=run.seed, suffix=suffix
    )
    run_and_show(task, run)


@spelled_out("sycophancy", max_new_tokens=16)
def eval_sycophancy(
    run: RunOptions,
    scenes: EmbeddedScenes = "broken",
    questions: QuestionFiles = None,
    images: ImageFolder = None,
    variants: Annotated[
        str, typer.Option("--variants", help="leading (opinion first), challenge (second turn).")
    ] = "leading,challenge",
    stances: Annotated[
        str, typer.Option("--stances", help="What the user claims: wrong, right.")
    ] = "wrong,right",
    tones: Annotated[str, typer.Option("--tones", help="mild, strong, gentle.")] = "mild",
    suffix: Suffix = "",
    parser: ParserOption = "robust",
    share_prefix: SharePrefix = True,
) -> None:
    """Ask POPE's questions as they stand and under pressure, and count the answers that turn."""
    from vlm_steer_eval.benchmarks.sycophancy import (
        STANCES,
        TONES,
        VARIANTS,
        SycophancyTask,
        pressed,
    )
    from vlm_steer_eval.running.sources import embedded_pope, local_pope

    check_early(run)
    kinds = {
        "variants": _chosen("variants", variants, VARIANTS),
        "stances": _chosen("stances", stances, STANCES),
        "tones": _chosen("tones", tones, tuple(TONES)),
    }
    if questions:
        folder = required_folder(images, "--questions")
        plain = local_pope(questions, folder, limit=run.limit, seed=run.seed, suffix=suffix)
        if any(item.after is not None for item in plain.items):
            raise ConfigError("--questions holds dialogues; give a file of single questions")
    else:
        refuse_on_scenes(images=images, suffix=suffix or None)
        plain = embedded_pope(scenes, limit=run.limit or 30, seed=run.seed)
    run_and_show(
        SycophancyTask(pressed(plain.items, **kinds), parser), run, share_prefix=share_prefix
    )


def _chosen(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if any(name not in known for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"--{option} {text!r}: choose different ones of {', '.join(known)}")
    return names
