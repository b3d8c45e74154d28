"""The commands of the harness: `eval`, `score`, `compare`, `tune`, `detect` and `demo`.

Nothing heavy is imported until a command runs, so that help is instant.
"""

from pathlib import Path
from typing import Annotated

import typer

from vlm_steer.commands.options import Seed

from .compare import compare
from .detect import register as register_detect
from .evaluation import eval_chair, eval_opope, eval_pope, eval_power, eval_presets
from .options import (
    EmbeddedScenes,
    Methods,
    OutputFolder,
)
from .published import (
    eval_amber,
    eval_beaf,
    eval_hallusionbench,
    eval_mme,
    eval_mmhal,
    eval_mmvp,
    eval_sycophancy,
)
from .score import (
    score_amber,
    score_beaf,
    score_chair,
    score_hallusionbench,
    score_mme,
    score_mmhal,
    score_mmvp,
    score_opope,
    score_pope,
)
from .tune import tune

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands of the harness to an application."""
    evaluate = typer.Typer(help="Run a benchmark, steered and unsteered.", no_args_is_help=True)
    evaluate.command(
        "pope",
        epilog="Example: vlm-steer eval pope --model tiny --methods none,pai,pai+vcd --output out",
    )(eval_pope)
    evaluate.command(
        "chair",
        epilog="Example: vlm-steer eval chair --model tiny --methods none,vcd --output out",
    )(eval_chair)
    evaluate.command(
        "opope",
        epilog="Example: vlm-steer eval opope --model tiny --methods none,vcd --output out",
    )(eval_opope)
    evaluate.command(
        "beaf",
        epilog="Example: vlm-steer eval beaf --questions beaf_qna.json --images images --model M "
        "--methods none,var --output out",
    )(eval_beaf)
    evaluate.command(
        "amber",
        epilog="Example: vlm-steer eval amber --data AMBER/data --images AMBER/image --model M "
        "--methods none,var --output out",
    )(eval_amber)
    evaluate.command(
        "mme",
        epilog="Example: vlm-steer eval mme --questions MME --images MME --model M --output out",
    )(eval_mme)
    evaluate.command(
        "hallusionbench",
        epilog="Example: vlm-steer eval hallusionbench --questions HallusionBench.json "
        "--images hallusion_bench --model M --output out",
    )(eval_hallusionbench)
    evaluate.command(
        "mmhal",
        epilog="Example: vlm-steer eval mmhal --template response_template.json --images images "
        "--judge hf:JUDGE --model M --output out",
    )(eval_mmhal)
    evaluate.command(
        "mmvp",
        epilog="Example: vlm-steer eval mmvp --questions Questions.csv --images 'MMVP Images' "
        "--model M --output out",
    )(eval_mmvp)
    evaluate.command(
        "sycophancy",
        epilog="Example: vlm-steer eval sycophancy --model tiny --methods none,lqcd --output out",
    )(eval_sycophancy)
    evaluate.command("presets", epilog="Example: vlm-steer eval presets pope/official")(
        eval_presets
    )
    evaluate.command(
        "power",
        epilog="Example: vlm-steer eval power --disagreement 0.05 --items 3000 --per-image 6 "
        "--correlation 0.1",
    )(eval_power)
    score = typer.Typer(
        help="Score answers or captions that anybody produced.", no_args_is_help=True
    )
    score.command(
        "pope",
        epilog="Example: vlm-steer score pope --questions coco_pope_random.json "
        "--answers answers.jsonl --parser official --output out",
    )(score_pope)
    score.command(
        "chair",
        epilog="Example: vlm-steer score chair --captions captions.jsonl "
        "--objects coco_objects.json.gz --output out",
    )(score_chair)
    score.command(
        "amber",
        epilog="Example: vlm-steer score amber --data AMBER/data --answers responses.json "
        "--part discriminative --output out",
    )(score_amber)
    score.command(
        "mme", epilog="Example: vlm-steer score mme --answers eval_tool/Your_Results --output out"
    )(score_mme)
    score.command(
        "hallusionbench",
        epilog="Example: vlm-steer score hallusionbench --questions HallusionBench.json "
        "--answers answers.jsonl --output out",
    )(score_hallusionbench)
    score.command(
        "opope",
        epilog="Example: vlm-steer score opope --captions captions.jsonl "
        "--questions coco_pope_random.json --output out",
    )(score_opope)
    score.command(
        "beaf",
        epilog="Example: vlm-steer score beaf --questions beaf_qna.json --answers answers.jsonl "
        "--output out",
    )(score_beaf)
    score.command(
        "mmhal",
        epilog="Example: vlm-steer score mmhal --responses responses.json "
        "--judge recorded:replies.jsonl --output out",
    )(score_mmhal)
    score.command(
        "mmvp",
        epilog="Example: vlm-steer score mmvp --questions Questions.csv --answers answers.jsonl "
        "--output out",
    )(score_mmvp)
    app.add_typer(evaluate, name="eval")
    app.add_typer(score, name="score")
    export = typer.Typer(help="Write results for other tools.", no_args_is_help=True)
    export.callback()(_export)
    export.command("inspect", epilog="Example: vlm-steer export inspect runs/pope --output logs")(
        export_inspect
    )
    app.add_typer(export, name="export")
    app.command(
        "compare",
        epilog="Example: vlm-steer compare runs/chair runs/chair_beams --trivial "
        "chair_beams/none --output out",
    )(compare)
    app.command("tune", epilog="Example: vlm-steer tune pai_captions.yaml --output runs/tune")(tune)
    register_detect(app)
    app.command("demo", epilog="Example: vlm-steer demo --output demo")(demo)


def _export() -> None:
    """Write results for other tools."""


def export_inspect(
    run: Annotated[Path, typer.Argument(help="Folder written by eval.", metavar="RUN")],
    output: OutputFolder,
) -> None:
    """Write a run as logs of inspect_ai, one per arm, for `inspect view --log-dir`."""
    from vlm_steer_eval.adapters.inspect_ai import export_run

    for path in export_run(run, output):
        typer.echo(path)


def demo(
    output: OutputFolder = Path("vlm-steer-demo"),
    methods: Methods = "none,pai,var,vhr,vcd,pai+vcd",
    scenes: EmbeddedScenes = "broken",
    pope_scenes: Annotated[
        int, typer.Option("--pope-scenes", min=1, help="Scenes to ask about.")
    ] = 14,
    chair_scenes: Annotated[
        int, typer.Option("--chair-scenes", min=1, help="Scenes to describe.")
    ] = 70,
    seed: Seed = 0,
) -> None:
    """Show on the embedded model what steering changes: POPE and CHAIR, with intervals."""
    from vlm_steer_eval.demo import run_demo

    result = run_demo(
        output,
        methods=methods,
        pope_scenes=pope_scenes,
        chair_scenes=chair_scenes,
        scenes=scenes,
        seed=seed,
        tell=lambda text: typer.echo(text, err=True),
    )
    typer.echo(result.chair.table)
    typer.echo(result.pope.table)
    typer.echo(f"report: {result.report} ({result.seconds:.0f} s)")
