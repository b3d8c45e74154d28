"""Whether runs differ, and whether what differs is more than a shorter text or a habit of yes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_steer.errors import ConfigError
from vlm_steer_eval.benchmarks.registry import BENCHMARKS, BINARY, discordant
from vlm_steer_eval.running.arms import control_kind, controls_among, is_tested, is_trivial
from vlm_steer_eval.running.runs import RunArm, Runs

from .closed_form import benjamini_hochberg, holm, mcnemar, minimum_detectable_difference
from .counts import Unit
from .frontier import Axes, frontier
from .matched import (
    Row,
    at_matched_length,
    at_matched_recall,
    at_matched_yes_ratio,
    at_yes_ratio,
    captions,
    length_adjusted,
    margins,
)
from .metrics import MetricSet, compare, summarise

__all__ = ["ALL", "compare_runs"]

ALL = "all"
"""All parts pooled."""

_MAX_SENTENCES = 8
_WORD_LIMITS = 8
_YES_RATIOS = tuple(share / 20 for share in range(1, 20))


def compare_runs(
    runs: Runs, *, trivial: Sequence[str] = (), n_resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Compare every arm with the baseline.

    Args:
        runs: from `load_runs`.
        trivial: names of arms that are trivial baselines themselves (another temperature, a length
            limit, beams); they are compared too, and extend the frontier. Arms called
            `trivial:...` are so without being named.
        n_resamples: bootstrap resamples and relabellings, > 0.
        seed: seed of both.

    Returns:
        `arms`: arm -> part -> `n` and `metrics`; `differences`: arm -> part -> metric -> paired
        difference with `ci95`, `p` and, for methods under test, `p_holm` and `p_bh` over these;
        `uncorrected`: the arms without those, trivial baselines and controls; `matched` and
        `length_adjusted`: arm -> the comparison with the usual excuse removed; `frontier`;
        `seeds`: arm -> metric -> its value under every seed that was pooled;
        `controls`: arm -> control -> metric -> paired difference to that control; `cost`; and
        `notes` on what could not be compared.

    Raises:
        ConfigError: a trivial arm does not exist, or is the baseline.
    """
    for name in trivial:
        if name not in runs.arms or name == runs.baseline:
            others = [arm for arm in runs.arms if arm != runs.baseline]
            raise ConfigError(f"--trivial {name!r} is no arm; choose among {', '.join(others)}")
    named = [name for name in runs.arms if is_trivial(name) and name != runs.baseline]
    trivial = list(dict.fromkeys([*trivial, *named]))
    comparison = _Comparison(runs, trivial, n_resamples, seed)
    return {
        "benchmark": runs.benchmark,
        **runs.scoring,
        "baseline": runs.baseline,
        "trivial": trivial,
        "uncorrected": [name for name in comparison.others if name not in comparison.tested],
        "n_units": len(comparison.base.units),
        "n_images": len(set(comparison.clusters)),
        "excluded": list(runs.excluded),
        "arms": comparison.summaries(),
        "differences": comparison.differences(),
        "matched": comparison.matched(),
        "length_adjusted": comparison.adjusted(),
        "frontier": comparison.frontier(),
        "seeds": comparison.seeds(),
        "controls": comparison.controls(),
        "cost": comparison.costs(),
        "notes": comparison.notes,
    }


class _Comparison:
    """The pieces of one comparison."""

    def __init__(self, runs: Runs, trivial: Sequence[str], n_resamples: int, seed: int) -> None:
        self.metrics = BENCHMARKS[runs.benchmark]
        self.base = runs.arms[runs.baseline]
        self.clusters = [unit.cluster for unit in self.base.units.values()]
        self.notes: list[str] = []
        self._runs = runs
        self._resampling: dict[str, int] = {"n_resamples": n_resamples, "seed": seed}
        self.others = {name: arm for name, arm in runs.arms.items() if name != runs.baseline}
        self._trivial = trivial
        self._methods = {name: arm for name, arm in self.others.items() if name not in trivial}
        # Nobody claims that a control helps, so controls take no part in corrections.
        self.tested = [name for name in self._methods if is_tested(name)]

    def summaries(self) -> dict[str, Any]:
        return {
            name: {
                part: {
                    "n": len(units),
                    "metrics": summarise(
                        self.metrics, _rows(arm, units), self._images(units), **self._resampling
                    ),
                }
                for part, units in self._parts().items()
            }
            for name, arm in self._runs.arms.items()
        }

    def differences(self) -> dict[str, Any]:
        table = {
            name: {part: self._difference(arm, units) for part, units in self._parts().items()}
            for name, arm in self.others.items()
        }
        for part in self._parts():
            for metric in self.metrics.formulas:
                _adjust([table[name][part][metric] for name in self.tested])
        return table

    def matched(self) -> dict[str, Any]:
        """At matched length and recall (CHAIR) or matched yes ratio (POPE)."""
        table: dict[str, Any] = {}
        for name, arm in self._methods.items():
            found = self._matched_one(arm)
            if found:
                table[name] = found
        for kind in ("length", "recall", "yes_ratio"):
            entries = [
                table[name][kind]["differences"]
                for name in self.tested
                if kind in table.get(name, {})
            ]
            for metric in self.metrics.formulas if entries else ():
                _adjust([entry[metric] for entry in entries])
        return table

    def adjusted(self) -> dict[str, Any]:
        """CHAIR's rate ratio at equal length, from a count model."""
        if self._runs.benchmark != "chair":
            return {}
        base = _rows(self.base, list(self.base.units))
        table = {
            name: length_adjusted(base, _rows(arm, list(arm.units)), self.clusters)
            for name, arm in self._methods.items()
        }
        fitted = {name: entry for name, entry in table.items() if entry is not None}
        self.notes += [
            f"{name}: no length-adjusted rate, since an arm hallucinates nothing or everything"
            for name in table
            if name not in fitted
        ]
        _adjust([entry for name, entry in fitted.items() if name in self.tested])
        return fitted

    def seeds(self) -> dict[str, Any]:
        """Arm -> metric -> its value under every seed, and their standard deviation."""
        return {
            name: {
                metric: {"values": values, "sd": _spread(values)}
                for metric, values in self._by_seed(arm).items()
            }
            for name, arm in (self._runs.arms.items() if self._runs.seeds else ())
        }

    def _by_seed(self, arm: RunArm) -> dict[str, list[float | None]]:
        sums = [np.asarray(_rows(arm, units)).sum(0) for units in self._runs.seeds]
        found = [self.metrics.evaluate(row) for row in sums]
        return {
            name: [None if np.isnan(f[name]) else float(f[name]) for f in found]
            for name in self.metrics.formulas
        }

    def frontier(self) -> dict[str, Any] | None:
        """The verdict against trivial baselines; None where the benchmark has no such trade."""
        points, axes = self._trivial_points()
        methods = {name: _rows(arm, list(arm.units)) for name, arm in self._methods.items()}
        if axes is None or not methods:
            return None
        return frontier(
            self.metrics,
            axes,
            points,
            methods,
            self.clusters,
            tested=self.tested,
            **self._resampling,
        )

    def controls(self) -> dict[str, Any]:
        """Every arm against the controls of its own that are among the arms.

        Each kind of control is a question of its own, which is put to every method.
        """
        table: dict[str, Any] = {}
        kinds: dict[str | None, list[dict[str, dict[str, Any]]]] = {}
        for name, arm in self.others.items():
            for control in controls_among(name, self.others):
                rival = _rows(self.others[control], list(self.base.units))
                rows = _rows(arm, list(self.base.units))
                found = self._compare_rows(self.metrics, rival, rows)
                table.setdefault(name, {})[control] = found
                kinds.setdefault(control_kind(control), []).append(found)
        for metric in self.metrics.formulas:
            for family in kinds.values():
                _adjust([found[metric] for found in family])
        return table

    def costs(self) -> dict[str, Any]:
        """Tokens, seconds, passes and memory of every arm that was timed, and their ratios."""
        base = self.base.cost
        table: dict[str, Any] = {}
        for name, arm in self._runs.arms.items():
            cost = arm.cost
            if cost is None or not cost.seconds or not cost.answers:
                continue
            speed = cost.tokens / cost.seconds
            entry: dict[str, Any] = {
                "tokens_per_answer": cost.tokens / cost.answers,
                "seconds_per_answer": cost.seconds / cost.answers,
                "tokens_per_second": speed,
                "passes_per_token": _ratio(cost.passes, cost.tokens),
                "memory": cost.memory,
                "relative_speed": None,
                "relative_passes": None,
                "relative_memory": None,
            }
            if base is not None and base.seconds and base.tokens:
                entry["relative_speed"] = speed / (base.tokens / base.seconds)
                before = _ratio(base.passes, base.tokens)
                entry["relative_passes"] = _ratio(entry["passes_per_token"], before)
                entry["relative_memory"] = _ratio(cost.memory, base.memory)
            table[name] = entry
        return table

    def _parts(self) -> dict[str, list[str]]:
        """Part -> its units; all of them last, where there is more than one part."""
        parts: dict[str, list[str]] = {}
        for name, unit in self.base.units.items():
            parts.setdefault(unit.part or ALL, []).append(name)
        return parts if len(parts) == 1 else {**parts, ALL: list(self.base.units)}

    def _images(self, units: Sequence[str]) -> list[str]:
        return [self.base.units[unit].cluster for unit in units]

    def _difference(self, arm: RunArm, units: Sequence[str]) -> dict[str, Any]:
        before, after = _rows(self.base, units), _rows(arm, units)
        table = compare(self.metrics, before, after, self._images(units), **self._resampling)
        if self._runs.benchmark in BINARY:
            metric, _, _ = BINARY[self._runs.benchmark]
            only_base, only_arm = discordant(self._runs.benchmark, before, after)
            table[metric]["mcnemar_p"] = mcnemar(only_base, only_arm).exact_p
            table[metric]["discordant"] = (only_base + only_arm) / len(units)
            table[metric]["detectable"] = minimum_detectable_difference(
                len(units), table[metric]["discordant"]
            )
        return table

    def _matched_one(self, arm: RunArm) -> dict[str, Any]:
        if self._runs.benchmark == "pope":
            found = at_matched_yes_ratio(self.base, arm, self._compare_rows)
            if found is None:
                self._note(
                    "the baseline has no first-token margins, so there is no comparison at matched "
                    "yes ratio; run it with `vlm-steer eval pope` and one beam"
                )
                return {}
            return {"yes_ratio": found}
        if self._runs.benchmark != "chair":
            return {}
        before, after = captions(self.base), captions(arm)
        if before is None or after is None:
            self._note("captions were not kept, so there is no comparison at matched length")
            return {}
        return {
            "length": at_matched_length(before, after, self._compare_rows),
            "recall": at_matched_recall(before, after, self._compare_rows),
        }

    def _compare_rows(
        self, metrics: MetricSet, before: Sequence[Row], after: Sequence[Row]
    ) -> dict[str, dict[str, Any]]:
        return compare(metrics, before, after, self.clusters, **self._resampling)

    def _trivial_points(self) -> tuple[dict[str, Sequence[Sequence[float]]], Axes | None]:
        """The baseline, what can be made of it for nothing, and the trivial arms."""
        points: dict[str, Sequence[Sequence[float]]] = {
            name: _rows(self._runs.arms[name], list(self.base.units))
            for name in (self._runs.baseline, *self._trivial)
        }
        if self._runs.benchmark == "chair":
            return points | self._truncations(), Axes("Recall", "CHAIRi")
        if self._runs.benchmark == "pope":
            return points | self._biases(), Axes("recall", "precision", falls=True)
        return points, None

    def _truncations(self) -> dict[str, Sequence[Sequence[float]]]:
        whole = captions(self.base)
        if whole is None:
            return {}
        longest = max(len(caption.sentences) for caption in whole)
        points: dict[str, Sequence[Sequence[float]]] = {
            f"first {n} sentence{'s' * (n > 1)}": [c.counts(c.after_sentences(n)) for c in whole]
            for n in range(1, min(longest, _MAX_SENTENCES + 1))
        }
        most = max(len(caption.starts) for caption in whole)
        for n in dict.fromkeys(most * part // _WORD_LIMITS for part in range(1, _WORD_LIMITS)):
            points[f"first {n} words"] = [c.counts(c.after_words(n)) for c in whole]
        return points

    def _biases(self) -> dict[str, Sequence[Sequence[float]]]:
        known = margins(self.base)
        if known is None:
            return {}
        return {f"yes to {share:.0%}": at_yes_ratio(*known, share) for share in _YES_RATIOS}

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _spread(values: Sequence[float | None]) -> float | None:
    """Standard deviation over seeds; None for a single one, or where one is undefined."""
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) == len(values) > 1 else None


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _rows(arm: RunArm, units: Sequence[str]) -> list[list[float]]:
    return [list(map(float, _unit(arm, unit).counts)) for unit in units]


def _unit(arm: RunArm, name: str) -> Unit:
    return arm.units[name]


def _adjust(entries: Sequence[dict[str, Any]]) -> None:
    """Add Holm's and Benjamini and Hochberg's adjusted p over the methods under test."""
    tested: list[Any] = [entry for entry in entries if entry["p"] is not None]
    raw = [entry["p"] for entry in tested]
    for entry, strict, lenient in zip(tested, holm(raw), benjamini_hochberg(raw), strict=True):
        entry["p_holm"], entry["p_bh"] = strict, lenient
