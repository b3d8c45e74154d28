"""What a study wants: objectives to improve and constraints to keep, by the names of metrics."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from vlm_steer._yaml import Place
from vlm_steer.registry import did_you_mean
from vlm_steer_eval.benchmarks.registry import BENCHMARKS

__all__ = ["COSTS", "METRICS", "Constraint", "Goals", "Metric", "Objective", "read_goals"]

Direction = Literal["min", "max"]

_BOUND = re.compile(r"baseline(?:\s*([-+*])\s*(\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class Metric:
    """Something that a study can ask for.

    Attributes:
        benchmark: whose counts it is a formula of; empty for costs.
        formula: its name there.
        scale: what turns the formula's value into the unit that is written and shown: 100 for
            fractions, shown in percent.
        better: the direction that helps; None where neither does.
    """

    benchmark: str
    formula: str
    scale: float = 100.0
    better: Direction | None = None


def _metric(benchmark: str, formula: str, scale: float = 100.0) -> Metric:
    higher = (BENCHMARKS[benchmark].higher_is_better or {}).get(formula)
    return Metric(benchmark, formula, scale, None if higher is None else "max" if higher else "min")


METRICS = MappingProxyType(
    {
        "chair_i": _metric("chair", "CHAIRi"),
        "chair_s": _metric("chair", "CHAIRs"),
        "recall": _metric("chair", "Recall"),
        "precision": _metric("chair", "Precision"),
        "f1": _metric("chair", "F1"),
        "length": _metric("chair", "Len", 1.0),
        "pope_accuracy": _metric("pope", "accuracy"),
        "pope_precision": _metric("pope", "precision"),
        "pope_recall": _metric("pope", "recall"),
        "pope_f1": _metric("pope", "f1"),
        "pope_yes_ratio": _metric("pope", "yes_ratio"),
        "cost": Metric("", "seconds", 1.0, "min"),
        "passes": Metric("", "passes", 1.0, "min"),
    }
)
"""Fractions in percent, the length in words, costs per token and relative to no steering."""

COSTS = tuple(name for name, metric in METRICS.items() if not metric.benchmark)
"""Metrics of generating rather than of answers; they have no interval."""


@dataclass(frozen=True)
class Objective:
    """A metric to push in one direction."""

    metric: str
    direction: Direction

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.direction == "max" else -1


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric.

    Attributes:
        metric: its name.
        at_least: whether the bound is a lower one.
        operator: how the bound follows from the unsteered value: `+`, `-` or `*`; empty for none.
        number: the other operand, or the bound itself.
    """

    metric: str
    at_least: bool
    operator: str
    number: float

    def bound(self, baseline: float) -> float:
        """The bound, given the unsteered value."""
        if self.operator == "*":
            return baseline * self.number
        if self.operator:
            return baseline + (self.number if self.operator == "+" else -self.number)
        return self.number

    def violation(self, value: float, baseline: float) -> float:
        """How far a value lies on the wrong side; 0 or less where it is allowed."""
        excess = value - self.bound(baseline)
        return -excess if self.at_least else excess

    def __str__(self) -> str:
        number = f"{self.number:g}"
        bound = f"baseline {self.operator} {number}" if self.operator else number
        return f"{self.metric} {'at least' if self.at_least else 'at most'} {bound}"


@dataclass(frozen=True)
class Goals:
    """Objectives and constraints of a study."""

    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics that matter, objectives first."""
        named = [o.metric for o in self.objectives] + [c.metric for c in self.constraints]
        return tuple(dict.fromkeys(named))

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """What has to be run for them."""
        found = {METRICS[name].benchmark for name in self.metrics} - {""}
        return tuple(sorted(found))


def read_goals(
    objectives: Mapping[str, object], constraints: Mapping[str, object], place: Place
) -> Goals:
    """Read the sections `objectives` and `constraints`.

    Args:
        objectives: metric -> `min` or `max`.
        constraints: metric -> `{at_least: BOUND}` or `{at_most: BOUND}`, a bound being a number or
            such as `baseline`, `baseline - 2`, `baseline * 1.5`.
        place: where the sections lie.

    Raises:
        ConfigError: a metric is unknown, a direction makes things worse, or a bound is malformed.
    """
    if not objectives:
        raise place["objectives"].error(
            "there is nothing to aim at. Write for example objectives: {chair_i: min, recall: max}."
        )
    wanted = tuple(
        _objective(name, direction, place["objectives"][name])
        for name, direction in objectives.items()
    )
    bounds = tuple(
        bound
        for name, written in constraints.items()
        for bound in _constraints(name, written, place["constraints"][name])
    )
    goals = Goals(wanted, bounds)
    if not goals.benchmarks:
        raise place["objectives"].error(
            "costs alone say nothing about answers. Add an objective or a constraint on them."
        )
    return goals


def _known(name: str, place: Place, what: str) -> Metric:
    if name not in METRICS:
        raise place.error(
            f"unknown {what} {name!r}.{did_you_mean(name, METRICS)} Known: {', '.join(METRICS)}."
        )
    return METRICS[name]


def _objective(name: str, direction: object, place: Place) -> Objective:
    better = _known(name, place, "objective").better
    if direction not in ("min", "max"):
        raise place.error(f"{name} must be min or max, not {direction!r}.")
    if better is not None and direction != better:
        raise place.error(f"{name}: {direction} would search for what is worse. Write {better}.")
    return Objective(name, "max" if direction == "max" else "min")


def _constraints(name: str, written: object, place: Place) -> list[Constraint]:
    _known(name, place, "metric")
    if not isinstance(written, Mapping) or not written or written.keys() - {"at_least", "at_most"}:
        raise place.error(
            f"the constraint on {name} must be such as {{at_least: baseline - 2}} or "
            "{at_most: 20}."
        )
    return [_constraint(name, key == "at_least", bound, place) for key, bound in written.items()]


def _constraint(name: str, at_least: bool, bound: object, place: Place) -> Constraint:
    if isinstance(bound, int | float) and not isinstance(bound, bool):
        return Constraint(name, at_least, "", float(bound))
    found = _BOUND.fullmatch(bound.strip()) if isinstance(bound, str) else None
    if found is None:
        raise place.error(
            f"the bound of {name} must be a number, baseline, or such as baseline - 2 or "
            f"baseline * 1.5, not {bound!r}."
        )
    operator, number = found.groups()
    return Constraint(name, at_least, operator or "+", float(number or 0))
