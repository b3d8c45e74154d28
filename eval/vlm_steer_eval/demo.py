"""The demonstration: the embedded model on its own world, steered and unsteered, in minutes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import vlm_steer
from vlm_steer.report import Paragraphs, Report, render_html
from vlm_steer_eval.benchmarks.tasks import Task
from vlm_steer_eval.files import write_json, write_text
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.pipeline import Evaluation, run_benchmark
from vlm_steer_eval.running.sources import embedded_chair, embedded_pope

__all__ = ["DEMO_METHODS", "Demo", "run_demo"]

DEMO_METHODS = "none,pai,var,vhr,vcd,pai+vcd"

_INTRODUCTION = (
    "A 4-million-parameter LLaVA that ships with the package describes little painted scenes in "
    "which the usual company of objects has been taken away, and answers yes/no questions about "
    "them. It has learnt what usually goes together, and so it names things that are not there.",
    "Every steered arm runs inside the ordinary generate() and is compared with the unsteered one "
    "on the same images. Settings are the methods' defaults; nothing was tuned on these scenes.",
    "The model is a stand-in: it shows that the mechanics work and how an effect is measured. "
    "Which method is best for a real model must be measured on that model.",
)


@dataclass(frozen=True)
class Demo:
    """What the demonstration produced.

    Attributes:
        pope: the evaluation on yes/no questions.
        chair: the evaluation on captions.
        report: the HTML file.
        seconds: wall-clock time.
    """

    pope: Evaluation
    chair: Evaluation
    report: Path
    seconds: float


def run_demo(
    output: Path,
    *,
    methods: str = DEMO_METHODS,
    pope_scenes: int = 14,
    chair_scenes: int = 70,
    scenes: str = "broken",
    batch_size: int = 100,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Compare steered settings with the baseline on POPE and CHAIR of the embedded scenes.

    Args:
        output: folder for `pope/`, `chair/`, `report.html` and `demo.json`. An interrupted demo
            continues there.
        methods: arms.
        pope_scenes: scenes to ask about, > 0; each gives up to six questions per split.
        chair_scenes: scenes to describe, > 0.
        scenes: `iid`, `broken` or `validation`.
        batch_size: items per batch, > 0.
        seed: seed of the choice of scenes and questions and of the resampling.
        tell: told, in a sentence, what happens next.

    Raises:
        ConfigError: an arm is unknown.
        DataError: there is no such split of scenes, or the folder cannot be written.
    """
    start = time.perf_counter()
    tell("loading the embedded model")
    model, processor = vlm_steer.load_tiny()
    tasks: dict[str, tuple[Task, int]] = {
        "pope": (embedded_pope(scenes, limit=pope_scenes, seed=seed), 4),
        "chair": (embedded_chair(scenes, limit=chair_scenes, seed=seed), 96),
    }
    evaluations: dict[str, Evaluation] = {}
    for name, (task, max_new_tokens) in tasks.items():
        tell(f"{name.upper()}: {len(task.items)} items for each of {methods}")
        evaluations[name] = run_benchmark(
            task,
            methods,
            model,
            processor,
            model_name="tiny",
            settings=Settings(max_new_tokens=max_new_tokens, seed=seed),
            batch_size=batch_size,
            output=output / name,
            seed=seed,
        )
    report = output / "report.html"
    blocks = [
        Paragraphs("What this is", _INTRODUCTION),
        *evaluations["chair"].blocks,
        *evaluations["pope"].blocks,
    ]
    subtitle = f"embedded model, scenes: {scenes}, arms: {methods}"
    write_text(report, render_html(Report("Does steering reduce hallucination?", subtitle, blocks)))
    summaries = {name: evaluation.summary for name, evaluation in evaluations.items()}
    write_json(output / "demo.json", {"methods": methods, "scenes": scenes, **summaries})
    seconds = time.perf_counter() - start
    return Demo(evaluations["pope"], evaluations["chair"], report, seconds)
