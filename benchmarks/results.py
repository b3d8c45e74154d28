"""Measure every method on the embedded model, with controls, into docs/results/.

python benchmarks/results.py --work runs/results [--model NAME=DIR ...] [--methods pai,vaf]
    [--set 'vti={"directions": "runs/vti.safetensors"}' ...]

Strengths are chosen on the ``validation`` scenes by the F1 of mentioned objects, and only then
measured on ``iid`` and ``broken``, for every checkpoint by itself, under greedy decoding and under
sampling. Beside each method that acts on attention, heads or states stands its sham: as much
change, in the wrong places. The work folder holds all answers; an interrupted run continues there.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from needs import method_needs
from transformers import __version__ as transformers_version

import vlm_steer
from vlm_steer.config import Spec, resolve
from vlm_steer.engine.hooks import Method
from vlm_steer.errors import SteerError
from vlm_steer.loading import load_model
from vlm_steer_eval.benchmarks.registry import BENCHMARKS
from vlm_steer_eval.benchmarks.tasks import Task
from vlm_steer_eval.reports.tables import format_difference, format_metric
from vlm_steer_eval.running.arms import BASELINE
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.pipeline import run_benchmark
from vlm_steer_eval.running.runs import RunArm, Runs, load_runs
from vlm_steer_eval.running.sources import embedded_chair, embedded_pope
from vlm_steer_eval.statistics.comparing import ALL, compare_runs
from vlm_steer_eval.statistics.metrics import compare

STRENGTHS: dict[str, tuple[dict[str, Any], ...]] = {
    "pai": tuple({"alpha": a, "gamma": 1.0} for a in (0.2, 0.5, 1.0)),
    "vcd": tuple({"noise_step": n} for n in (300, 500, 700)),
    "vhr": tuple({"alpha": a} for a in (1.25, 1.5, 2.0)),
    "vaf": tuple({"alpha": a} for a in (0.15, 0.5)),
    "deco": tuple({"alpha": a} for a in (0.3, 0.6)),
}
"""What is tried on the validation scenes; every other method is measured at its defaults."""

MECHANICS = {
    "agla": "it matches text and image by the model's own attention: no dual encoder knows these "
    "pictures",
    "halc": "it finds and matches objects by the model's own attention and log-probabilities: no "
    "detector and no dual encoder knows these pictures",
    "icd": "the model was trained on no word of the disturbing instruction",
    "lqcd": "the model was trained on no leading question",
    "mvp": "the model was trained on no question behind a caption",
    "vdgd": "the model was trained on no prompt that holds a description",
}
"""Methods of which this model cannot show more than that they run, and why."""

DECODINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampling": {"temperature": 1.0}}
TRIVIAL: dict[str, dict[str, Any]] = {
    "temperature 0.5": {"temperature": 0.5},
    "3 beams": {"num_beams": 3},
}
"""Ways of decoding that change the trade of recall for error without any method."""

CAPTION_TOKENS, ANSWER_TOKENS = 96, 4
CHAIR = {"CHAIRi": "CHAIR_i", "CHAIRs": "CHAIR_s", "Recall": "recall", "Len": "words"}
POPE = ("random", "popular", "adversarial")


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

    def measure(self, task: Task, arms: Mapping[str, Spec], name: str, **decoding: Any) -> Path:
        """Run one benchmark into a folder; answers that are there are not generated again."""
        model, processor = self.loaded
        tokens = CAPTION_TOKENS if task.name == "chair" else ANSWER_TOKENS
        output = self.work / self.name / f"{name}-{task.name}"
        run_benchmark(
            task,
            dict(arms),
            model,
            processor,
            model_name=self.name,
            settings=Settings(max_new_tokens=tokens, **decoding),
            batch_size=100,
            output=output,
        )
        return output

    @cached_property
    def tried(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """The options of methods that are tried on the validation scenes."""
        needs = method_needs(*self.loaded, self.work / self.name / "needs")
        return {name: (options,) for name, options in needs.items()} | STRENGTHS

    def refusals(self, methods: Sequence[str]) -> dict[str, str]:
        """Methods that this model refuses, with the reason."""
        model, processor = self.loaded
        refused = {}
        for name in methods:
            try:
                first = _spec(name, self.tried.get(name, ({},))[0])
                vlm_steer.attach(model, first, processor=processor).detach()
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
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD=JSON", help="options of a method"
    )
    parser.add_argument("--tune", type=int, default=100, help="validation scenes")
    parser.add_argument("--chair", type=int, default=200, help="captioned scenes per split")
    parser.add_argument("--pope", type=int, default=40, help="scenes asked about per split")
    chosen = parser.parse_args()
    sizes = Sizes(chosen.tune, chosen.chair, chosen.pope)
    named = chosen.methods.split(",") if chosen.methods else _measurable()
    for entry in chosen.set:
        name, _, options = entry.partition("=")
        STRENGTHS[name] = (json.loads(options),)
    chosen.output.mkdir(parents=True, exist_ok=True)
    for entry in chosen.model or ["seed0=tiny"]:
        name, _, source = entry.partition("=")
        report = measure(Checkpoint(name, source, chosen.work), named, sizes)
        path = chosen.output / f"embedded_{name}"
        path.with_suffix(".json").write_text(json.dumps(report) + "\n")
        path.with_suffix(".md").write_text(page(name, report))
    found = sorted(chosen.output.glob("embedded_*.json"))
    reports = {path.stem.removeprefix("embedded_"): json.loads(path.read_text()) for path in found}
    (chosen.output / "controls.md").write_text(controls_page(reports))


def measure(checkpoint: Checkpoint, methods: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Choose strengths on validation scenes, then measure on the others."""
    left_out = checkpoint.refusals(methods)
    left_out |= {name: "not measured" for name in _measurable() if name not in methods}
    methods = [name for name in methods if name not in left_out]
    arms = {name: _spec(name, best) for name, best in _tuned(checkpoint, methods, sizes).items()}
    shams = {f"sham:{name}": sham for name, spec in arms.items() if (sham := _sham(spec))}
    # A search has a decoding of its own, and no other beside it.
    steps = {n: spec for n, spec in arms.items() if vlm_steer.get_method(n).search is Method.search}
    groups = {"greedy": {**arms, **shams}, "sampling": steps}
    splits: dict[str, Any] = {}
    for split in ("iid", "broken"):
        splits[split] = {}
        for task in (
            embedded_chair(split, limit=sizes.chair),
            embedded_pope(split, limit=sizes.pope),
        ):
            folders = {
                decoding: checkpoint.measure(
                    task, groups[decoding], f"{split}-{decoding}", **settings
                )
                for decoding, settings in DECODINGS.items()
            }
            trivial = {
                name: checkpoint.measure(task, {}, f"{split}-{name.replace(' ', '-')}", **settings)
                for name, settings in TRIVIAL.items()
                if task.name == "chair"
            }
            for decoding, folder in folders.items():
                others = {n: f for n, f in folders.items() if n != decoding}
                found = compared(folder, others | trivial)
                splits[split].setdefault(decoding, {})[task.name] = found
    return {
        "settings": arms,
        "left_out": left_out,
        "sizes": dataclasses.asdict(sizes),
        "transformers": transformers_version,
        "splits": splits,
    }


def compared(folder: Path, trivial: Mapping[str, Path]) -> dict[str, Any]:
    """The arms of a folder against its unsteered one, the frontier of trivial decodings included.

    ``against_sham`` holds the paired differences of each method to its sham.
    """
    everything = load_runs([folder, *trivial.values()])
    mine = {
        name.removeprefix(f"{folder.name}/"): arm
        for name, arm in everything.arms.items()
        if name.startswith(f"{folder.name}/")
    }
    decodings = {n: everything.arms[f"{path.name}/{BASELINE}"] for n, path in trivial.items()}
    runs = dataclasses.replace(everything, arms={**mine, **decodings}, baseline=BASELINE)
    found = compare_runs(runs, trivial=tuple(decodings))
    summary = json.loads((folder / "scores.json").read_text())
    found["against_sham"] = _against_shams(runs)
    return shown(found | {key: summary[key] for key in ("changed_nothing", "notes")})


def shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a comparison that the pages show, rounded."""

    def pick(table: Mapping[str, Any]) -> dict[str, Any]:
        kept = {metric: table[metric] for metric in (*CHAIR, "f1", "yes_ratio") if metric in table}
        return {metric: _rounded(entry) for metric, entry in kept.items()}

    return {
        "arms": {
            arm: {part: {"metrics": pick(entry["metrics"])} for part, entry in by_part.items()}
            for arm, by_part in found["arms"].items()
        },
        "differences": {
            arm: {part: pick(entry) for part, entry in by_part.items()}
            for arm, by_part in found["differences"].items()
        },
        "matched": {
            arm: {
                kind: {"differences": pick(entry["differences"])} for kind, entry in kinds.items()
            }
            for arm, kinds in found["matched"].items()
        },
        "frontier": {
            "verdicts": {
                arm: _rounded(entry) for arm, entry in found["frontier"]["verdicts"].items()
            }
        },
        "against_sham": {arm: pick(entry) for arm, entry in found["against_sham"].items()},
        **{key: found[key] for key in ("changed_nothing", "notes")},
    }


def _rounded(entry: Mapping[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(number) for number in value]
        return round(value, 5) if isinstance(value, float) else value

    return {key: short(value) for key, value in entry.items()}


def _against_shams(runs: Runs) -> dict[str, Any]:
    def rows(arm: RunArm) -> list[Sequence[float]]:
        return [unit.counts for unit in arm.units.values()]

    clusters = [unit.cluster for unit in runs.arms[runs.baseline].units.values()]
    metrics = BENCHMARKS[runs.benchmark]
    return {
        name: compare(metrics, rows(runs.arms[f"sham:{name}"]), rows(arm), clusters)
        for name, arm in runs.arms.items()
        if f"sham:{name}" in runs.arms
    }


def _measurable() -> list[str]:
    """Methods that change something; shams are added beside them."""
    methods = {name: vlm_steer.get_method(name) for name in vlm_steer.list_methods()}
    return [n for n, method in methods.items() if not method.observer and n != "sham"]


def _tuned(
    checkpoint: Checkpoint, methods: Sequence[str], sizes: Sizes
) -> dict[str, dict[str, Any]]:
    """The best options of each method on validation scenes, by the F1 of mentioned objects."""
    choices = {name: checkpoint.tried.get(name, ({},)) for name in methods}
    tried = {
        f"{name} {json.dumps(options)}": (name, options)
        for name, several in choices.items()
        for options in several
        if len(several) > 1
    }
    best: dict[str, dict[str, Any]] = {name: several[0] for name, several in choices.items()}
    if not tried:
        return best
    task = embedded_chair("validation", limit=sizes.tune)
    specs = {arm: _spec(name, options) for arm, (name, options) in tried.items()}
    folder = checkpoint.measure(task, specs, "validation-greedy")
    found = json.loads((folder / "scores.json").read_text())["arms"]
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


def page(name: str, report: Mapping[str, Any]) -> str:
    """The results of one checkpoint as Markdown."""
    sizes = report["sizes"]
    lines = [
        f"# Every method on the embedded model, {name}",
        "",
        "Written by `python benchmarks/results.py`; float32, transformers "
        f"{report['transformers']}. Where several strengths were tried, one was chosen on "
        f"{sizes['tune']} `validation` scenes by the F1 of mentioned objects; the others "
        f"are as listed under *Settings*. Captions of {sizes['chair']} scenes and questions about "
        f"{sizes['pope']} scenes per split.",
        "",
        "In brackets, 95 % intervals of the difference to the unsteered model, paired by scene; a "
        "star means p < 0.05 after Holm's correction over the methods, in which controls and "
        "trivial baselines take no part. *Against its sham*: the difference to as much change in "
        "the wrong places. *Frontier*: whether the arm lies beyond what shorter captions, another "
        "temperature and beams (CHAIR) or a constant bias towards yes (POPE) give for nothing; ° "
        "where p is uncorrected, as that of controls. *At matched recall* and *at the same yes "
        "rate* compare after the unsteered model was cut, or biased, to say as much. Methods that "
        "search have a decoding of their own and stand under greedy. Rows marked *mechanics only* "
        "are of methods that need what this model has not (see below). One small checkpoint is no "
        "ground to rank methods.",
    ]
    for split, decodings in report["splits"].items():
        for decoding, found in decodings.items():
            chair, pope = found["chair"], found["pope"]
            lines += ["", f"## {split}, {decoding}", "", *_chair_table(chair)]
            lines += ["", *_pope_table(pope), "", *_remarks(chair)]
    lines += ["", "## Mechanics only", ""]
    lines += [f"- `{arm}`: {why}." for arm, why in MECHANICS.items() if arm in report["settings"]]
    if report["left_out"]:
        lines += ["", "## Left out", ""]
        lines += [f"- `{arm}`: {why}" for arm, why in report["left_out"].items()]
    lines += ["", "## Settings", ""]
    lines += [f"- `{arm}`: `{json.dumps(spec)}`" for arm, spec in report["settings"].items()]
    return "\n".join(lines) + "\n"


def controls_page(reports: Mapping[str, Any]) -> str:
    """What is left of the gains of all checkpoints beside the controls, as Markdown."""
    lines = [
        "# What the controls say",
        "",
        "Written by `python benchmarks/results.py` from the runs behind "
        + " and ".join(f"[{name}](embedded_{name}.md)" for name in reports)
        + ". Differences of F1 (POPE, all questions) and of CHAIR_i to the unsteered model under "
        "the same decoding, with 95 % intervals paired by scene. A method's row is worth reading "
        "against three others:",
        "",
        "- `plausibility_mask` under sampling: what ruling out unlikely tokens gives without any "
        "contrast. Published contrasts carry such a mask and are compared with sampling without "
        "one;",
        "- `greedy`: what sampling less gives;",
        "- *at the same yes rate*: what is left when the unsteered model says yes as often, by a "
        "constant bias on its first token. The biased model takes the likelier answer, so under "
        "sampling the column also holds what sampling costs; the row of a method that changes "
        "nothing says how much that is.",
    ]
    for name, report in reports.items():
        for split, decodings in report["splits"].items():
            lines += ["", f"## {name}, {split}", "", *_controls_table(decodings)]
    return "\n".join(lines) + "\n"


def _controls_table(decodings: Mapping[str, Any]) -> list[str]:
    def change(decoding: str, benchmark: str, metric: str, arm: str) -> str:
        by_part = decodings[decoding][benchmark]["differences"].get(arm)
        return "" if by_part is None else _difference(metric, list(by_part.values())[-1])

    heads = ["arm"]
    for decoding in DECODINGS:
        heads += [f"F1, {decoding}", f"at the same yes rate, {decoding}", f"CHAIR_i, {decoding}"]
    arms = [arm for d in DECODINGS for arm in decodings[d]["pope"]["arms"] if arm != BASELINE]
    rows = []
    for arm in dict.fromkeys(arm for arm in arms if not arm.startswith("sham:")):
        cells = []
        for decoding in DECODINGS:
            matched = decodings[decoding]["pope"]["matched"].get(arm, {}).get("yes_ratio", {})
            cells += [
                change(decoding, "pope", "f1", arm),
                _difference("f1", matched.get("differences", {})),
                change(decoding, "chair", "CHAIRi", arm),
            ]
        rows.append([_label(arm), *cells])
    return _table(heads, rows)


def _remarks(found: Mapping[str, Any]) -> list[str]:
    idle = [f"`{arm}`" for arm in found["changed_nothing"] if not arm.startswith("sham:")]
    lines = [f"- Changed nothing, so that the row repeats the first: {', '.join(idle)}."]
    return (lines if idle else []) + [
        f"- `{arm}`: {note}"
        for arm, notes in found["notes"].items()
        if not arm.startswith("sham:")
        for note in notes
    ]


def _chair_table(found: Mapping[str, Any]) -> list[str]:
    heads = ["arm", *CHAIR.values(), "CHAIR_i at matched recall", "CHAIR_i against its sham"]
    rows = []
    for arm, by_part in found["arms"].items():
        cells = [_cell(found, arm, metric, next(iter(by_part))) for metric in CHAIR]
        matched = found["matched"].get(arm, {}).get("recall", {}).get("differences", {})
        sham = found["against_sham"].get(arm, {})
        cells += [_difference("CHAIRi", matched), _difference("CHAIRi", sham)]
        rows.append([_label(arm), *cells, _verdict(found, arm)])
    return _table([*heads, "frontier"], rows)


def _pope_table(found: Mapping[str, Any]) -> list[str]:
    heads = ["arm", *(f"F1 {part}" for part in POPE), "yes rate", "F1 at the same yes rate"]
    rows = []
    for arm in found["arms"]:
        cells = [_cell(found, arm, "f1", part) for part in POPE]
        matched = found["matched"].get(arm, {}).get("yes_ratio", {}).get("differences", {})
        cells += [_cell(found, arm, "yes_ratio", ALL), _difference("f1", matched)]
        rows.append([_label(arm), *cells, _verdict(found, arm)])
    return _table([*heads, "frontier"], rows)


def _label(arm: str) -> str:
    return f"{arm} (mechanics only)" if arm in MECHANICS else arm


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _verdict(found: Mapping[str, Any], arm: str) -> str:
    entry = found["frontier"]["verdicts"].get(arm)
    if entry is None:
        return ""
    is_claim = entry["verdict"] != "not distinguishable"
    return f"{entry['verdict']}{'°' if is_claim and entry['p_holm'] is None else ''}"


def _difference(metric: str, differences: Mapping[str, Any]) -> str:
    return format_difference(metric, differences[metric]) if metric in differences else ""


def _cell(found: Mapping[str, Any], arm: str, metric: str, part: str) -> str:
    value = format_metric(metric, found["arms"][arm][part]["metrics"][metric])[0]
    difference = found["differences"].get(arm, {}).get(part, {}).get(metric)
    if difference is None:
        return value
    change = format_difference(metric, difference)
    star = "*" if "*" in change else ""
    return f"{value}{star} {change[change.index('[') :]}" if "[" in change else value


if __name__ == "__main__":
    main()
