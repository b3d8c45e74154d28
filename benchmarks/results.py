"""Measure every method on the embedded model, with shams, into docs/results/.

python benchmarks/results.py --work runs/results [--model NAME=DIR ...] [--methods pai,vaf]

Strengths are chosen on the ``validation`` scenes by the F1 of mentioned objects, and only then
measured on ``iid`` and ``broken``, for every checkpoint by itself. Beside each method that acts on
attention, heads or states stands its sham: as much change, in the wrong places. The work folder
holds all answers; an interrupted run continues there.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import __version__ as transformers_version

import vlm_steer
from vlm_steer.config import Spec, resolve
from vlm_steer.errors import SteerError
from vlm_steer.loading import load_model
from vlm_steer_eval.generation import Settings
from vlm_steer_eval.metrics import compare
from vlm_steer_eval.pipeline import Evaluation, run_benchmark
from vlm_steer_eval.results import score_all
from vlm_steer_eval.sources import embedded_chair, embedded_pope
from vlm_steer_eval.tables import format_difference, format_metric
from vlm_steer_eval.tasks import Task

STRENGTHS: dict[str, tuple[dict[str, Any], ...]] = {
    "pai": tuple({"alpha": a, "gamma": 1.0} for a in (0.2, 0.5, 1.0)),
    "vcd": tuple({"noise_step": n} for n in (300, 500, 700)),
    "vhr": tuple({"alpha": a} for a in (1.25, 1.5, 2.0)),
    "vaf": tuple({"alpha": a} for a in (0.15, 0.5)),
    "deco": tuple({"alpha": a} for a in (0.3, 0.6)),
}
"""What is tried on the validation scenes; every other method is measured at its defaults."""

CHAIR = ("CHAIRi", "CHAIRs", "Recall", "Len")
POPE = ("random", "popular", "adversarial")
_CAPTION_TOKENS, _ANSWER_TOKENS = 96, 4
_LABELS = {"CHAIRi": "CHAIR_i", "CHAIRs": "CHAIR_s", "Recall": "recall", "Len": "words"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many scenes are used for what."""

    tune: int
    chair: int
    pope: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model by the name under which its results are filed."""

    name: str
    source: str
    work: Path

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and processor."""
        return load_model(self.source)

    def measure(self, task: Task, arms: Mapping[str, Spec], tokens: int, name: str) -> Evaluation:
        """Run one benchmark; answers that the work folder has are not generated again."""
        model, processor = self.loaded
        return run_benchmark(
            task,
            dict(arms),
            model,
            processor,
            model_name=self.name,
            settings=Settings(max_new_tokens=tokens),
            batch_size=100,
            output=self.work / self.name / name,
        )

    def refusals(self, methods: Sequence[str]) -> dict[str, str]:
        """Methods that this model refuses at their defaults, with the reason."""
        model, processor = self.loaded
        refused = {}
        for name in methods:
            try:
                vlm_steer.attach(model, name, processor=processor).detach()
            except SteerError as error:
                refused[name] = str(error)
        return refused


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of all answers")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--methods", help="methods to measure; all by default")
    parser.add_argument("--tune", type=int, default=100, help="validation scenes")
    parser.add_argument("--chair", type=int, default=200, help="captioned scenes per split")
    parser.add_argument("--pope", type=int, default=40, help="scenes asked about per split")
    chosen = parser.parse_args()
    sizes = Sizes(chosen.tune, chosen.chair, chosen.pope)
    named = chosen.methods.split(",") if chosen.methods else _measurable()
    chosen.output.mkdir(parents=True, exist_ok=True)
    for entry in ["seed0=tiny", *chosen.model]:
        name, _, source = entry.partition("=")
        checkpoint = Checkpoint(name, source, chosen.work)
        report = measure(checkpoint, named, sizes)
        path = chosen.output / f"embedded_{name}"
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(name, report))


def measure(checkpoint: Checkpoint, methods: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Choose strengths on validation scenes, then measure on the others."""
    left_out = checkpoint.refusals(methods)
    methods = [name for name in methods if name not in left_out]
    arms = {name: _spec(name, best) for name, best in _tuned(checkpoint, methods, sizes).items()}
    pairs = {name: sham for name, spec in arms.items() if (sham := _sham(spec)) is not None}
    everything = {**arms, **{f"sham:{name}": spec for name, spec in pairs.items()}}
    splits = {}
    for split in ("iid", "broken"):
        chair_task = embedded_chair(split, limit=sizes.chair)
        chair = checkpoint.measure(chair_task, everything, _CAPTION_TOKENS, f"{split}-chair")
        pope_task = embedded_pope(split, limit=sizes.pope)
        pope = checkpoint.measure(pope_task, everything, _ANSWER_TOKENS, f"{split}-pope")
        splits[split] = {
            "chair": _scores(chair),
            "pope": _scores(pope),
            "against_sham": _against_shams(chair_task, chair, list(pairs)),
        }
    return {
        "settings": arms,
        "left_out": left_out,
        "sizes": dataclasses.asdict(sizes),
        "transformers": transformers_version,
        "splits": splits,
    }


def _measurable() -> list[str]:
    """Methods that change something; shams are added beside them."""
    methods = {name: vlm_steer.get_method(name) for name in vlm_steer.list_methods()}
    return [n for n, method in methods.items() if not method.observer and n != "sham"]


def _tuned(
    checkpoint: Checkpoint, methods: Sequence[str], sizes: Sizes
) -> dict[str, dict[str, Any]]:
    """The best options of each method on validation scenes, by the F1 of mentioned objects."""
    tried = {
        f"{name} {json.dumps(options)}": (name, options)
        for name in methods
        for options in STRENGTHS.get(name, ())
    }
    best: dict[str, dict[str, Any]] = {name: {} for name in methods}
    if not tried:
        return best
    task = embedded_chair("validation", limit=sizes.tune)
    specs = {arm: _spec(name, options) for arm, (name, options) in tried.items()}
    found = checkpoint.measure(task, specs, _CAPTION_TOKENS, "validation-chair").summary["arms"]
    top = dict.fromkeys(methods, -1.0)
    for arm, (name, options) in tried.items():
        (summary,) = found[arm].values()
        f1 = float(summary["metrics"]["F1"]["value"])
        if f1 > top[name]:
            top[name], best[name] = f1, options
    return best


def _spec(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": name, **options}


def _sham(spec: dict[str, Any]) -> dict[str, Any] | None:
    sham = {"method": "sham", "of": spec}
    try:
        resolve(sham)
    except SteerError:
        return None
    return sham


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    kept = ("arms", "differences", "changed_nothing", "notes", "n_images", "n_items")
    return {key: evaluation.summary[key] for key in kept}


def _against_shams(task: Task, evaluation: Evaluation, methods: Sequence[str]) -> dict[str, Any]:
    """Paired differences of CHAIR between each method and its sham."""
    scores = score_all(task, evaluation.run)
    clusters = [item.cluster for item in task.items]
    counts = {
        arm: [scored[item.id].counts for item in task.items] for arm, scored in scores.items()
    }
    return {
        name: compare(task.metrics, counts[f"sham:{name}"], counts[name], clusters)["CHAIRi"]
        for name in methods
    }


def page(name: str, report: Mapping[str, Any]) -> str:
    """The results of one checkpoint as Markdown."""
    sizes = report["sizes"]
    lines = [
        f"# Every method on the embedded model, {name}",
        "",
        "Written by `python benchmarks/results.py`; greedy decoding, float32, transformers "
        f"{report['transformers']}. Where several strengths were tried, one was chosen on "
        f"{sizes['tune']} `validation` scenes by the F1 of mentioned objects; the others are "
        f"defaults. Captions of {sizes['chair']} scenes and questions about {sizes['pope']} scenes "
        "per split. In brackets, 95 % intervals of the difference to the unsteered model, paired "
        "by scene; a star means p < 0.05 after Holm's correction over the arms. `sham:` rows make "
        "as much change in the wrong places. One small checkpoint is no ground to rank methods.",
    ]
    for split, found in report["splits"].items():
        lines += ["", f"## {split}", "", *_chair_table(found), "", *_pope_table(found)]
        lines += [
            f"- `{arm}` changed nothing here: its row repeats the unsteered one."
            for arm in found["chair"]["changed_nothing"]
        ]
        lines += [
            f"- `{arm}`: {note}"
            for arm, notes in found["chair"]["notes"].items()
            if not arm.startswith("sham:")
            for note in notes
        ]
    lines += ["", "## Left out", ""]
    lines += [f"- `{arm}`: {why}" for arm, why in report["left_out"].items()]
    lines += ["", "## Settings", ""]
    lines += [f"- `{arm}`: `{json.dumps(spec)}`" for arm, spec in report["settings"].items()]
    return "\n".join(lines) + "\n"


def _chair_table(found: Mapping[str, Any]) -> list[str]:
    heads = [_LABELS[metric] for metric in CHAIR]
    lines = [
        f"| arm | {' | '.join(heads)} | CHAIR_i against its sham |",
        "|---" * (len(CHAIR) + 2) + "|",
    ]
    for arm in found["chair"]["arms"]:
        cells = [_cell(found["chair"], arm, None, metric) for metric in CHAIR]
        against = found["against_sham"].get(arm)
        last = format_difference("CHAIRi", against) if against else ""
        lines.append(f"| {arm} | {' | '.join(cells)} | {last} |")
    return lines


def _pope_table(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| arm | {' | '.join(f'F1 {split}' for split in POPE)} | yes rate, adversarial |",
        "|---" * (len(POPE) + 2) + "|",
    ]
    for arm in found["pope"]["arms"]:
        cells = [_cell(found["pope"], arm, split, "f1") for split in POPE]
        cells.append(_cell(found["pope"], arm, "adversarial", "yes_ratio"))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _cell(scores: Mapping[str, Any], arm: str, split: str | None, metric: str) -> str:
    by_split = scores["arms"][arm]
    split = split or next(iter(by_split))
    value = format_metric(metric, by_split[split]["metrics"][metric])[0]
    difference = scores["differences"].get(arm, {}).get(split, {}).get(metric)
    if difference is None:
        return value
    change = format_difference(metric, difference)
    star = "*" if "*" in change else ""
    return f"{value}{star} {change[change.index('[') :]}" if "[" in change else value


if __name__ == "__main__":
    main()
