"""The search: Optuna over a journal that survives a kill and serves many workers."""

import fcntl
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vlm_steer.engine.hooks import Method
from vlm_steer.errors import CompositionError, ConfigError, DataError, UnsupportedModelError
from vlm_steer_eval.files import read_json, reporting_write_errors, write_json
from vlm_steer_eval.running.genlog import content_key

from .goals import COSTS, METRICS, Goals
from .measure import Meter, Score, difference, judged, restricted, setting_key, summary
from .space import Space

__all__ = ["REFUSED", "SamplerName", "TuningStudy", "require_optuna", "score_of"]

SamplerName: TypeAlias = Literal["tpe", "nsga2", "random"]

STUDY_NAME = "study.json"
JOURNAL_NAME = "journal.log"
REFUSED = "refused"
"""Attribute of a trial whose setting could not be tried, with the reason."""

_NAME = "tune"
_IDENTITY = "identity"
"""Attribute of the study in the journal: a hash of what its results depend on."""
_POLL_SECONDS = 1.0
_QUICK_RESAMPLES = 2000
_WAIT_BEFORE_MEDIAN = 5
_SHOWN_BYTES = 20


def require_optuna() -> Any:
    """The package `optuna`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "tuning needs optuna, which is not installed; pip install 'vlm-steer[tune]'"
        ) from error
    return optuna


class TuningStudy:
    """A study in a folder, as one of its workers sees it; use as a context manager.

    Args:
        folder: of the study; created where absent.
        identity: what the results depend on, as plain data. A folder keeps to its own.
        space: what is searched.
        goals: what for.
        sampler: `tpe`, `nsga2` or `random`.
        n_trials: settings to try, given-up ones included.
        prune: whether hopeless settings are given up before the last part of the data.
        seed: seed of the sampler.

    Raises:
        ConfigError: the folder holds another study, or Optuna is absent.
        DataError: the journal is damaged, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        space: Space,
        goals: Goals,
        *,
        sampler: SamplerName,
        n_trials: int,
        prune: bool,
        seed: int,
    ) -> None:
        self.optuna = require_optuna()
        self.folder = folder
        self.space = space
        self.goals = goals
        self._identity = dict(identity)
        self._sampler_name = sampler
        self._n_trials = n_trials
        self._prune = prune
        self._seed = seed
        self._worker = uuid.uuid4().hex[:12]

    def __enter__(self) -> "TuningStudy":
        with reporting_write_errors(self.folder):
            (self.folder / "workers").mkdir(parents=True, exist_ok=True)
            self._alive = _try_lock(self._lock_of(self._worker))
            with locked(self.folder / "study.lock"):
                is_known = (self.folder / STUDY_NAME).is_file()
                _keep_to(self.folder / STUDY_NAME, self._identity, write=False)
                self._study = self._open()
                self._claim_journal(is_known=is_known)
                _keep_to(self.folder / STUDY_NAME, self._identity)
                if not self._study.get_trials(deepcopy=False):
                    self._study.enqueue_trial(self.space.start())
        return self

    def __exit__(self, *_: object) -> None:
        if self._alive is not None:
            os.close(self._alive)
        self._lock_of(self._worker).unlink(missing_ok=True)

    def trials(self) -> list[Any]:
        """Optuna's frozen trials, without those that a killed worker left unfinished."""
        return [t for t in self._study.get_trials(deepcopy=False) if not self._is_lost(t)]

    def front(self) -> list[Any]:
        """Complete trials that keep the constraints and are beaten by none; settings once each."""
        feasible: dict[str, Any] = {}
        for trial in self.complete():
            if all(violation <= 0 for violation in trial.user_attrs["violations"]):
                feasible.setdefault(trial.user_attrs["setting"], trial)
        gains = {t.number: self._gains(t) for t in feasible.values()}
        return [
            trial
            for trial in feasible.values()
            if not any(_beats(gains[o.number], gains[trial.number]) for o in feasible.values())
        ]

    def _gains(self, trial: Any) -> list[float]:
        """The objectives' values, more being better."""
        pairs = zip(self.goals.objectives, trial.values, strict=True)
        return [objective.sign * value for objective, value in pairs]

    def complete(self) -> list[Any]:
        """Trials that were measured on all tuning images."""
        done = self.optuna.trial.TrialState.COMPLETE
        return [t for t in self.trials() if t.state == done]

    @contextmanager
    def alone(self, task: str) -> Iterator[None]:
        """Do something that one worker at a time may do."""
        with locked(self.folder / f"{task}.lock"):
            yield

    def methods_of(self, trial: Any) -> tuple[Method, ...]:
        """The setting of a trial."""
        return self.space.suggest(self.optuna.trial.FixedTrial(trial.params))

    def work(
        self,
        meter: Meter,
        baseline: Score,
        *,
        tell: Callable[[str], None],
        wait: bool,
    ) -> None:
        """Try settings until the study has as many as it should.

        Args:
            meter: measures a setting.
            baseline: the unsteered model on the same data.
            tell: told every result in a line, those of other workers too.
            wait: whether to stay until other workers have finished too, and to take over what
                they leave behind.

        Raises:
            DataError: the disk is full or an answer log is damaged; finished trials are kept.
            SteerError: memory runs out with a batch of one.
        """
        told = {t.number for t in self.trials() if t.state.is_finished()}
        if told:
            tell(f"{len(told)} of {self._n_trials} settings are known already")
        while True:
            claimed = self._claim()
            if claimed is not None and claimed[1]:
                self._try(*claimed, meter, baseline)
            for trial in self.trials():
                if trial.state.is_finished() and trial.number not in told:
                    told.add(trial.number)
                    tell(self._line(trial))
            if claimed is not None:
                continue
            if wait and self._running():
                time.sleep(_POLL_SECONDS)
            else:
                return

    # -- one trial ---------------------------------------------------------------------------

    def _claim(self) -> tuple[Any, tuple[Method, ...]] | None:
        """The next trial and its setting; None when there are enough. No methods if refused."""
        states = self.optuna.trial.TrialState
        with locked(self.folder / "study.lock"):
            self._recover()
            kept = [t for t in self.trials() if t.state != states.WAITING]
            if len(kept) >= self._n_trials:
                return None
            # Seeded by the number of the trial, a continued study proposes what it would have
            # proposed without the interruption.
            self._study.sampler = self._sampler(self._seed + len(kept))
            with _quiet():
                trial = self._study.ask()
                trial.set_user_attr("worker", self._worker)
                try:
                    methods = self.space.suggest(trial)
                except ConfigError as error:
                    self._refuse(trial, error)
                    return trial, ()
            setting = setting_key(methods)
            if any(t.user_attrs.get("setting") == setting for t in self._running()):
                self._refuse(trial, "another worker is trying the same setting")
                return trial, ()
            trial.set_user_attr("setting", setting)
            return trial, methods

    def _try(self, trial: Any, methods: tuple[Method, ...], meter: Meter, baseline: Score) -> None:
        twin = self._twin(trial)
        if twin is not None:
            self._finish(trial, score_of(twin), baseline)
            return
        score = Score()
        for part in range(meter.n_parts):
            try:
                meter.add(score, methods, part)
            except (ConfigError, UnsupportedModelError, CompositionError) as error:
                self._refuse(trial, error)
                return
            reason = self._hopeless(trial, part, score, baseline) if self._prune else None
            if reason is not None and part < meter.n_parts - 1:
                trial.set_user_attr("given_up", reason)
                self._store(trial, score, baseline)
                self._tell(trial, state=self.optuna.trial.TrialState.PRUNED)
                return
        self._finish(trial, score, baseline)

    def _finish(self, trial: Any, score: Score, baseline: Score) -> None:
        values = self._store(trial, score, baseline)
        wanted = [values[o.metric] for o in self.goals.objectives]
        if None in wanted:
            trial.set_user_attr("given_up", "an objective is undefined: nothing was mentioned")
            self._tell(trial, state=self.optuna.trial.TrialState.PRUNED)
        else:
            self._tell(trial, values=wanted)

    def _store(self, trial: Any, score: Score, baseline: Score) -> dict[str, float | None]:
        values = judged(self.goals, score, baseline)
        bases = judged(self.goals, restricted(baseline, score), baseline)
        trial.set_user_attr("score", score.as_dict())
        trial.set_user_attr("values", values)
        trial.set_user_attr("notes", score.notes)
        trial.set_user_attr(
            "violations",
            [
                constraint.violation(value, base)
                if (value := values[constraint.metric]) is not None
                and (base := bases[constraint.metric]) is not None
                else 1.0
                for constraint in self.goals.constraints
            ],
        )
        return values

    def _refuse(self, trial: Any, reason: object) -> None:
        trial.set_user_attr(REFUSED, str(reason))
        self._tell(trial, state=self.optuna.trial.TrialState.FAIL)

    def _tell(self, trial: Any, **outcome: Any) -> None:
        with _quiet():
            self._study.tell(trial, **outcome)

    def _twin(self, trial: Any) -> Any | None:
        """A complete trial of the same setting."""
        setting = trial.user_attrs["setting"]
        return next((t for t in self.complete() if t.user_attrs["setting"] == setting), None)

    # -- giving up ---------------------------------------------------------------------------

    def _hopeless(self, trial: Any, part: int, score: Score, baseline: Score) -> str | None:
        """Why a setting need not be measured further; None where it may still be good."""
        base = restricted(baseline, score)
        for constraint in self.goals.constraints:
            if self._surely_violated(constraint, score, base):
                return f"{constraint} is violated beyond doubt"
        for other in self.complete():
            if self._surely_beaten(score, restricted(score_of(other), score)):
                return f"worse than trial {other.number} in every objective beyond doubt"
        if len(self.goals.objectives) > 1:
            return None  # Optuna's own pruners know one objective only
        value = judged(self.goals, score, base)[self.goals.objectives[0].metric]
        if value is None:
            return None
        with _quiet():
            trial.report(value, part)
            return "worse than the median of the trials before" if trial.should_prune() else None

    def _surely_violated(self, constraint: Any, score: Score, base: Score) -> bool:
        if constraint.metric in COSTS:
            return False
        found = (
            difference(constraint.metric, score, base, n_resamples=_QUICK_RESAMPLES)
            if constraint.operator
            else summary(constraint.metric, score, n_resamples=_QUICK_RESAMPLES)
        )
        before = judged(self.goals, base, base)[constraint.metric]
        if found["ci95"] is None or before is None:
            return False
        scale = METRICS[constraint.metric].scale
        shift = before if constraint.operator else 0.0
        return all(constraint.violation(shift + scale * end, before) > 0 for end in found["ci95"])

    def _surely_beaten(self, score: Score, other: Score) -> bool:
        for objective in self.goals.objectives:
            if objective.metric in COSTS:
                own, rival = (each.spent.get(objective.metric) for each in (score, other))
                if not own or not rival or own <= rival:
                    return False
                continue
            found = difference(objective.metric, score, other, n_resamples=_QUICK_RESAMPLES)
            if found["ci95"] is None or any(objective.sign * end >= 0 for end in found["ci95"]):
                return False
        return True

    # -- the journal -------------------------------------------------------------------------

    def _open(self) -> Any:
        path = self.folder / JOURNAL_NAME
        lock = _JournalLock(self.folder / "journal.lock")
        storages, pruners = self.optuna.storages, self.optuna.pruners
        try:
            with locked(lock.path):
                _cut_torn_line(path)
            storage = storages.JournalStorage(
                storages.journal.JournalFileBackend(str(path), lock_obj=lock)
            )
            with _quiet():
                others = set(self.optuna.get_all_study_names(storage)) - {_NAME}
                if others:
                    raise ConfigError(
                        f"{path} is the journal of another study, {', '.join(sorted(others))}; "
                        "give another --output"
                    )
                return self.optuna.create_study(
                    storage=storage,
                    study_name=_NAME,
                    load_if_exists=True,
                    directions=[f"{o.direction}imize" for o in self.goals.objectives],
                    pruner=pruners.MedianPruner(n_startup_trials=_WAIT_BEFORE_MEDIAN),
                )
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise DataError(
                f"{path} is damaged ({error}); restore it, or give another --output. The answers "
                f"in {self.folder / 'answers'} are intact"
            ) from error

    def _claim_journal(self, *, is_known: bool) -> None:
        """Mark a new journal as this study's; refuse one that is another's."""
        mine, found = content_key(self._identity), self._study.user_attrs.get(_IDENTITY)
        if found is None and (is_known or not self._study.get_trials(deepcopy=False)):
            with _quiet():
                self._study.set_user_attr(_IDENTITY, mine)
        elif found != mine:
            raise ConfigError(
                f"{self.folder / JOURNAL_NAME} is the journal of another study, whose trials would "
                f"pass for this one's; give another --output, or restore its {STUDY_NAME}"
            )

    def _sampler(self, seed: int) -> Any:
        samplers = self.optuna.samplers
        common: dict[str, Any] = {"seed": seed}
        if self.goals.constraints and self._sampler_name != "random":
            common["constraints_func"] = lambda trial: trial.user_attrs.get("violations", (1.0,))
        with _quiet():
            if self._sampler_name == "random":
                return samplers.RandomSampler(**common)
            if self._sampler_name == "nsga2":
                population = max(4, min(50, self._n_trials // 4))
                return samplers.NSGAIISampler(population_size=population, **common)
            start = max(4, min(10, self._n_trials // 3))
            return samplers.TPESampler(n_startup_trials=start, **common)

    def _recover(self) -> None:
        """Give up the trials of workers that died, and put their settings in the queue again."""
        for trial in self._running():
            if not self._is_alive(trial.user_attrs.get("worker")):
                with _quiet():
                    self._study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
                    known = trial.system_attrs.get("fixed_params", {}) | trial.params
                    if known:
                        self._study.enqueue_trial(known)

    def _running(self) -> list[Any]:
        states = self.optuna.trial.TrialState
        return [t for t in self._study.get_trials(deepcopy=False) if t.state == states.RUNNING]

    def _is_lost(self, trial: Any) -> bool:
        failed = self.optuna.trial.TrialState.FAIL
        return trial.state == failed and REFUSED not in trial.user_attrs

    def _is_alive(self, worker: str | None) -> bool:
        if worker is None:
            return False
        path = self._lock_of(worker)
        if not path.exists():
            return False
        held = _try_lock(path)
        if held is None:
            return True
        os.close(held)
        path.unlink(missing_ok=True)
        return False

    def _lock_of(self, worker: str) -> Path:
        return self.folder / "workers" / f"{worker}.lock"

    def _line(self, trial: Any) -> str:
        n_done = len([t for t in self.trials() if t.state.is_finished()])
        head = f"trial {trial.number} ({n_done} of {self._n_trials})"
        setting = ", ".join(f"{k} {_short(v)}" for k, v in trial.params.items())
        if REFUSED in trial.user_attrs:
            return f"{head}: {setting}: refused: {trial.user_attrs[REFUSED]}"
        values = ", ".join(
            f"{name} {'–' if v is None else f'{v:.2f}'}"
            for name, v in trial.user_attrs["values"].items()
        )
        end = trial.user_attrs.get("given_up")
        broken = any(v > 0 for v in trial.user_attrs["violations"])
        note = f" (given up: {end})" if end else " (breaks a constraint)" if broken else ""
        return f"{head}: {setting}: {values}{note}"


def _beats(first: Sequence[float], second: Sequence[float]) -> bool:
    no_worse = all(a >= b for a, b in zip(first, second, strict=True))
    return no_worse and list(first) != list(second)


def score_of(trial: Any) -> Score:
    """What a trial measured."""
    stored = trial.user_attrs["score"]
    return Score(stored["counts"], stored["spent"], trial.user_attrs["notes"])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes; the system frees it when its holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _JournalLock:
    """The lock that Optuna takes around every write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None where another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _keep_to(path: Path, identity: Mapping[str, Any], *, write: bool = True) -> None:
    """Write what the study is, or refuse a folder that holds another one."""
    if not path.is_file():
        if write:
            write_json(path, identity)
        return
    known = read_json(path)
    plain = json.loads(json.dumps(identity))
    if not isinstance(known, dict):
        raise DataError(f"{path} does not describe a study; give another --output")
    unlike = [key for key in plain if known.get(key) != plain[key]]
    if unlike:
        raise ConfigError(
            f"{path.parent} holds another study: it differs in {', '.join(unlike)}. Give another "
            "--output, or undo the change; nothing was written"
        )


def _cut_torn_line(path: Path) -> None:
    """Remove what a kill left of the last line; Optuna would read no line behind it.

    Raises:
        ValueError: it is not the beginning of a line of a journal, so no kill left it.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    torn = content[len(whole) :]
    if not torn:
        return
    if not torn.startswith(b"{"):
        raise ValueError(f"it ends in {torn[:_SHOWN_BYTES]!r}")
    with path.open("ab") as file:
        file.truncate(len(whole))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's messages, which speak to its own users."""
    optuna = require_optuna()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
