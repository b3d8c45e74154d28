"""Measure every detector on the embedded model, with controls, into docs/results/.

python benchmarks/detectors.py --work runs/detectors

Weights, calibration and thresholds are fitted on ``validation`` scenes and judged on ``iid`` and
``broken`` ones. The work folder holds all texts and features; an interrupted run continues there.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version

from vlm_steer.detection import Detector, FittedDetector, Trace, Unit, build_detector, made_for
from vlm_steer.detection.base import list_detectors
from vlm_steer.errors import SteerError
from vlm_steer.loading import load_model
from vlm_steer_eval.benchmarks.tasks import ChairTask, Item
from vlm_steer_eval.detection.data import Collected, Settings, collect, split_images
from vlm_steer_eval.detection.drop import Dropping, drop_curves
from vlm_steer_eval.detection.labels import Labelled, caption_labels
from vlm_steer_eval.detection.run import evaluate, fit, table
from vlm_steer_eval.reports.tables import format_metric
from vlm_steer_eval.running.arms import BASELINE
from vlm_steer_eval.running.generation import Settings as Decoding
from vlm_steer_eval.running.pipeline import run_benchmark
from vlm_steer_eval.running.runs import load_runs
from vlm_steer_eval.running.sources import embedded_chair
from vlm_steer_eval.statistics.comparing import compare_runs

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lookback_ratio, context": ("lookback_ratio", {"parts": ["context"]}),
    "svar, each head": ("svar", {"heads": "each", "layers": "all"}),
}
"""Detectors measured beside those at their defaults."""

LEFT_OUT = {
    "cross_check": "needs other models, of which none is embedded",
    "object_check": "needs object detectors, of which none is embedded",
}
OF_TEXTS = (
    *("position", "logprob", "entropy", "margin"),
    *("lap_eigvals", "attn_eigvals", "attn_logdet", "attn_score"),
)
DROPPING = (
    "logprob",
    "svar, each head",
    "lookback_ratio",
    "visual_dependence",
    "meta_token",
    "self_check",
)
GUIDE = "lookback_ratio, context"
GUIDES = {"fitted lookback": None, "lookback": "lookback", "log-probability": "log_probability"}
"""What chooses chunks; None is the fitted detector `GUIDE`."""
CANDIDATES = (2, 4, 8)
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}
"""What candidates are sampled with, and the decoding without a choice among them."""
_TOKENS = 96


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of texts and features")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--fit", type=int, default=400, help="validation scenes")
    parser.add_argument("--test", type=int, default=300, help="scenes per split")
    parser.add_argument(
        "--samples", type=int, default=0, help="answers that self_check draws; 0: it asks"
    )
    parser.add_argument(
        "--guided", type=int, default=100, help="scenes per split for guided decoding; 0: none"
    )
    parser.add_argument("--resamples", type=int, default=1000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model(chosen.model)
    report, guide = measure(model, processor, chosen)
    write(report, chosen.output)
    if chosen.guided:
        for split, found in report["splits"].items():
            found["guided"] = _guided((model, processor), guide, split, chosen)
        write(report, chosen.output)


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write the numbers and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "detectors.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "detectors.md").write_text(page(report))


def measure(
    model: Any, processor: Any, chosen: argparse.Namespace
) -> tuple[dict[str, Any], FittedDetector]:
    """Fit on validation scenes, judge on the others; the numbers, and what may guide decoding."""
    detectors = _detectors(chosen.samples)

    def seen(task: ChairTask) -> Collected:
        settings = Settings(_TOKENS, batch_size=50)
        return collect(
            both(task), model, processor, detectors, settings, chosen.work, model_name=chosen.model
        )

    fitting = seen(embedded_chair("validation", limit=chosen.fit))
    about = made_for(model, processor)
    mentions, texts = _by_kind(fitting)
    of_mentions = _fitted(detectors, mentions.labelled, about)
    of_texts = _fitted({n: detectors[n] for n in OF_TEXTS}, texts.labelled, about)
    splits: dict[str, Any] = {}
    for split in ("iid", "broken"):
        task = embedded_chair(split, limit=chosen.test)
        mentions, texts = _by_kind(seen(task))
        splits[split] = {
            "mentions": evaluate(of_mentions, mentions.labelled, n_resamples=chosen.resamples),
            "texts": evaluate(of_texts, texts.labelled, n_resamples=chosen.resamples),
            "dropping": _dropping(of_mentions, mentions, task, chosen.resamples),
        }
    report = {
        "fit_scenes": chosen.fit,
        "test_scenes": chosen.test,
        "guided_scenes": chosen.guided,
        "fit_units": len(_by_kind(fitting)[0].labelled.units),
        "samples": chosen.samples,
        "resamples": chosen.resamples,
        "transformers": transformers_version,
        "options": {name: detector.options() for name, detector in detectors.items()},
        "left_out": LEFT_OUT,
        "splits": splits,
    }
    return report, of_mentions[GUIDE]


def both(task: ChairTask) -> Labelled:
    """First mentions, and every caption as a whole."""
    first, whole = caption_labels(task), caption_labels(task, mentions="text")

    def units(trace: Trace, item: Item) -> list[Unit]:
        return first.units(trace, item) + whole.units(trace, item)

    return Labelled("captions, first mentions and whole texts", task.items, units)


def _detectors(n_samples: int) -> dict[str, Detector]:
    plain = {name: build_detector(name) for name in list_detectors() if name not in LEFT_OUT}
    # Sampling the answers of self_check costs several times everything else together.
    asked = (
        {"n_samples": n_samples, "max_new_tokens": _TOKENS} if n_samples else {"how": "question"}
    )
    plain["self_check"] = build_detector("self_check", asked)
    return plain | {name: build_detector(*of) for name, of in VARIANTS.items()}


def _by_kind(data: Collected) -> tuple[Collected, Collected]:
    is_mention = torch.tensor([bool(unit.name) for unit in data.units])
    return data.where(is_mention), data.where(~is_mention)


def _fitted(
    detectors: Mapping[str, Detector], data: Collected, about: Mapping[str, Any]
) -> dict[str, FittedDetector]:
    parts = ["calibration" if part == "test" else "train" for part in split_images(data.image)]
    found = {}
    for name, detector in detectors.items():
        try:
            found[name] = fit(detector, data, about, parts=parts, name=name)
        except SteerError as error:
            raise SteerError(f"{name}: {error}") from error
    return found


def _dropping(
    fitted: Mapping[str, FittedDetector], data: Collected, task: ChairTask, n_resamples: int
) -> dict[str, Any]:
    truth = {item.id: frozenset(item.gold["objects"]) for item in task.items}
    risks = {n: fitted[n].raw(data.features[n], data.words).numpy() for n in DROPPING}
    # Every detector would be this one, if it were always right.
    risks["perfect"] = (data.labels == 1).double().numpy()
    return drop_curves(risks, Dropping(data, truth, task.normaliser), n_resamples=n_resamples)


def _guided(
    loaded: tuple[Any, Any],
    fitted: FittedDetector,
    split: str,
    chosen: argparse.Namespace,
) -> dict[str, Any]:
    """Captions that detectors chose chunk by chunk, against decodings that need none."""
    arms = {
        f"{name}, {n}": {
            "method": "guided_decoding",
            "detector": _saved(fitted, chosen.work) if guide is None else guide,
            "n_candidates": n,
        }
        for name, guide in GUIDES.items()
        for n in CANDIDATES
    }
    folders = []
    for name, methods, decoding in (("guided", arms, {}), ("sampled", {}, SAMPLED)):
        folders.append(chosen.work / f"{name}-{split}")
        run_benchmark(
            embedded_chair(split, limit=chosen.guided),
            methods,
            *loaded,
            model_name=chosen.model,
            settings=Decoding(max_new_tokens=_TOKENS, **decoding),
            batch_size=50,
            output=folders[-1],
            n_resamples=chosen.resamples,
        )
    sampled = f"{folders[1].name}/{BASELINE}"
    found = compare_runs(load_runs(folders), trivial=(sampled,), n_resamples=chosen.resamples)
    verdicts = found["frontier"]["verdicts"]
    names = {f"{folders[0].name}/{BASELINE}": "greedy", sampled: "sampled"}
    return {
        names.get(arm, arm.partition("/")[2]): {
            **parts[split]["metrics"],
            "against_trivial": verdicts.get(arm),
        }
        for arm, parts in found["arms"].items()
    }


def _saved(fitted: FittedDetector, work: Path) -> str:
    """The folder of a detector, named by what is in it: answers are kept by that name."""
    content = json.dumps([fitted.raw(torch.eye(fitted.made_for["n_features"])).tolist()])
    folder = work / f"guide-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    fitted.save_pretrained(folder)
    return str(folder)


def page(report: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    n = report["samples"]
    asked = f"`self_check` drew {n} answers." if n else "`self_check` asked about each object."
    lines = [
        "# Every detector on the embedded model",
        "",
        "Written by `python benchmarks/detectors.py`; greedy captions, float32, transformers "
        f"{report['transformers']}. Weights, calibration and thresholds were fitted on captions of "
        f"{report['fit_scenes']} `validation` scenes ({report['fit_units']} labelled first "
        f"mentions) and judged on {report['test_scenes']} scenes per split that fitting has not "
        f"seen. In brackets, 95 % intervals from {report['resamples']} resamples of scenes.",
        "",
        "*At equal position* compares mentions in the same tenth of positions; *within a caption* "
        "pairs of one caption, at most ten words apart. *Gain over place* is the AUROC that the "
        "detector adds to logistic regression on position, its logarithm and occurrence, on "
        "scenes left out of that regression. A detector works if the interval of its gain "
        "excludes 0, which is not corrected for the number of detectors. "
        f"{asked} Spectra belong to whole captions, so mentions of one caption tie. One small "
        "model is no ground to rank detectors.",
        "",
        "*Flag and drop* takes out of all captions of a split the sentences of the riskiest "
        "mentions. What needs no detector: flagging the last mentions (`position`), flagging any "
        "(`random`, the mean of 20 draws), or ending captions before the last mentions "
        "(`cut short`). `perfect` flags by the truth. *Guided decoding* writes captions of "
        f"{report['guided_scenes']} scenes per split in chunks of 8 tokens, each the candidate "
        f"that a detector trusts most: `{GUIDE}` fitted as above, lookback ratios without weights, "
        "or log-probability. What needs none: greedy captions, also cut short after so many "
        "sentences, and captions sampled as the candidates are.",
        "",
        "Shortening buys a lower CHAIR_i with recall, so a point counts only where its CHAIR_i "
        "lies below the staircase of these trivial points at its own recall; p values are "
        "corrected over the points of a table by Holm's method.",
    ]
    for split, found in report["splits"].items():
        lines += ["", f"## {split}", "", _size(found["mentions"], "first mentions"), ""]
        lines += table(found["mentions"]).rstrip().splitlines()
        lines += ["", _size(found["texts"], "whole captions") + " Place is the length.", ""]
        lines += table(found["texts"]).rstrip().splitlines()
        lines += ["", "### Flag and drop", "", *_drop_table(found["dropping"])]
        if "guided" in found:
            lines += ["", "### Guided decoding", "", *_guided_table(found["guided"])]
    lines += ["", "## Left out", ""]
    lines += [f"- `{name}`: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines) + "\n"


def _size(found: Mapping[str, Any], what: str) -> str:
    share = f"{100 * found['base_rate']:.1f} %"
    return f"{found['n_units']} {what} of {found['n_images']} scenes, {share} hallucinated."


def _drop_table(found: Mapping[str, Any]) -> list[str]:
    rows = [("nothing", "", found["whole"])]
    for curves in (found["trivial"], found["detectors"]):
        for name, curve in curves.items():
            rows += [(name, f"{100 * point['flagged']:.0f} %", point) for point in curve]
    return _points(("flagged by", "mentions"), rows)


def _guided_table(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (name, n, point) for arm, point in found.items() for name, _, n in [arm.partition(", ")]
    ]
    return _points(("chosen by", "candidates"), rows)


def _points(
    heads: tuple[str, str], rows: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> list[str]:
    """A table of points of recall and CHAIR_i, and whether any detector lies beyond the trivial."""
    lines = [
        f"| {heads[0]} | {heads[1]} | CHAIR_i | recall | words | below the frontier by | verdict |",
        "|---" * 7 + "|",
    ]
    beyond = []
    for name, size, point in rows:
        cells = [_interval(key, point[key]) for key in ("CHAIRi", "Recall", "Len")]
        against = point.get("against_trivial")
        gap, verdict = "", "control"
        if against is not None:
            gap = _interval("CHAIRi", {"value": against["gap"], "ci95": against["ci95"]})
            verdict = against["verdict"]
        if verdict == "beyond" and name != "perfect":
            beyond.append(f"{name} ({size})")
        lines.append(f"| {name} | {size} | {' | '.join(cells)} | {gap} | {verdict} |")
    told = f"Beyond the trivial frontier: {', '.join(beyond)}."
    return [told if beyond else "**None of these lies beyond the trivial frontier.**", "", *lines]


def _interval(name: str, entry: Mapping[str, Any]) -> str:
    value, interval = format_metric(name, entry)
    return f"{value} [{interval.replace(' … ', ', ')}]" if interval else value


if __name__ == "__main__":
    main()
