"""Measure every detector on the embedded model, with controls, into docs/results/.

python benchmarks/detectors.py --work runs/detectors

Weights, calibration and thresholds are fitted on ``validation`` scenes and judged on ``iid`` and
``broken`` ones. The work folder holds all texts and features; an interrupted run continues there.
"""

import argparse
import json
from collections.abc import Mapping
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
from vlm_steer_eval.detection.drop import drop_curve
from vlm_steer_eval.detection.labels import Labelled, caption_labels
from vlm_steer_eval.detection.run import evaluate, fit, table
from vlm_steer_eval.reports.tables import format_metric
from vlm_steer_eval.running.sources import embedded_chair

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
DROPPING = ("position", "logprob", "svar, each head", "lookback_ratio", "meta_token")
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
    parser.add_argument("--resamples", type=int, default=1000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(chosen)
    chosen.output.mkdir(parents=True, exist_ok=True)
    path = chosen.output / "detectors"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(report))


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Fit on validation scenes, judge on the others."""
    model, processor = load_model(chosen.model)
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
    return {
        "fit_scenes": chosen.fit,
        "test_scenes": chosen.test,
        "fit_units": len(_by_kind(fitting)[0].labelled.units),
        "samples": chosen.samples,
        "resamples": chosen.resamples,
        "transformers": transformers_version,
        "options": {name: detector.options() for name, detector in detectors.items()},
        "left_out": LEFT_OUT,
        "splits": splits,
    }


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
    return {
        name: drop_curve(
            fitted[name].raw(data.features[name], data.words).numpy(),
            data,
            truth,
            task.normaliser,
            n_resamples=n_resamples,
        )
        for name in DROPPING
    }


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
    ]
    for split, found in report["splits"].items():
        lines += ["", f"## {split}", "", _size(found["mentions"], "first mentions"), ""]
        lines += table(found["mentions"]).rstrip().splitlines()
        lines += ["", _size(found["texts"], "whole captions") + " Place is the length.", ""]
        lines += table(found["texts"]).rstrip().splitlines()
        lines += ["", "Flag and drop: captions without the sentences of the riskiest mentions.", ""]
        lines += _drop_table(found["dropping"])
    lines += ["", "## Left out", ""]
    lines += [f"- `{name}`: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines) + "\n"


def _size(found: Mapping[str, Any], what: str) -> str:
    share = f"{100 * found['base_rate']:.1f} %"
    return f"{found['n_units']} {what} of {found['n_images']} scenes, {share} hallucinated."


def _drop_table(curves: Mapping[str, Any]) -> list[str]:
    shares = [point["flagged"] for point in next(iter(curves.values()))]
    heads = [f"{100 * share:.0f} % flagged" for share in shares]
    lines = [f"| CHAIR_i / recall | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, curve in curves.items():
        cells = [
            " / ".join(format_metric(key, point[key])[0] for key in ("CHAIRi", "Recall"))
            for point in curve
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
