"""A whole tuning: search, front, choice, confirmation, files."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import vlm_steer
from vlm_steer.config import dump
from vlm_steer.errors import ConfigError, SteerError
from vlm_steer.loading import load_model
from vlm_steer.report import Report, render_html
from vlm_steer_eval.files import write_json, write_rows, write_text
from vlm_steer_eval.reports.tables import render
from vlm_steer_eval.running.fingerprint import model_fingerprint, versions
from vlm_steer_eval.running.genlog import content_key

from .data import Material, gather, limited
from .measure import Meter, Score, judged
from .outcome import choose, confirm, confirmed, describe
from .plan import Plan, read_plan
from .study import TuningStudy, require_optuna, score_of
from .telling import front_blocks, front_table, provenance, spoken, trial_row, verdict, write_winner

__all__ = ["Outcome", "Request", "tune"]

WINNER_NAME = "best.yaml"
_WIDTH = 200


@dataclass(frozen=True)
class Request:
    """What to tune and how, as plain data that another process can take.

    Attributes:
        file: the tuning file.
        output: folder of the study.
        overrides: options to use instead of those of the file, where not None.
        max_new_tokens: longest answer of every benchmark; None for those of the file.
        loading: keyword arguments of `vlm_steer.loading.load_model`.
        batch_size: items per batch, > 0.
        n_resamples: resamples of the intervals, > 0.
        workers: processes on this machine, >= 1.
        join: only add trials to the study; another process concludes it.
        choice: number of the trial to confirm instead of the one that the file's rule names.
    """

    file: Path
    output: Path
    overrides: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    n_resamples: int = 10_000
    workers: int = 1
    join: bool = False
    choice: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished tuning.

    Attributes:
        summary: the contents of `tune.json`.
        text: the tables and sentences for people.
        winner: the file with the chosen steering.
    """

    summary: dict[str, Any]
    text: str
    winner: Path


def tune(request: Request, tell: Callable[[str], None] = lambda _: None) -> Outcome | None:
    """Search, choose, confirm, and write everything about it into the study's folder.

    The folder holds `journal.log` and `study.json` (the study, which the same call continues),
    `answers/` (a log per setting), `trials.jsonl`, `confirm/` (the held-out run, as `vlm-steer
    eval` writes it), `tune.json`, `table.txt`, `report.html` and `best.yaml`.

    Args:
        request: what to do.
        tell: told, in a sentence, what has happened.

    Returns:
        What was found; None for a process that only joins.

    Raises:
        ConfigError: the file is wrong, the folder holds another study, or Optuna is absent.
        DataError: data cannot be used, no setting keeps the constraints, or the disk is full.
        SteerError: the model refuses an end of a range, or memory runs out.
    """
    require_optuna()
    plan = read_plan(request.file, **request.overrides)
    options = plan.options
    material = gather(
        limited(plan.tuning, request.max_new_tokens),
        plan.held_out,
        n_images=options.images,
        n_held_out=options.held_out_images,
        seed=options.seed,
    )
    model, processor = load_model(options.model, **request.loading)
    _refuse_on_model(plan, model, processor)
    identity = _identity(plan, material, model)
    meter = Meter(
        model,
        processor,
        options.model,
        material,
        options.generation,
        request.batch_size,
        request.output / "answers",
    )
    names = ", ".join(parameter.name for parameter in plan.space.parameters)
    tell(f"{options.trials} settings of {names} on {material.n_images['tuning']} images")
    with (
        TuningStudy(
            request.output,
            identity,
            plan.space,
            plan.goals,
            sampler=options.sampler,
            n_trials=options.trials,
            prune=options.prune,
            seed=options.seed,
        ) as study,
        _helpers(request),
    ):
        with study.alone("baseline"):
            baseline = meter.whole(())
        base = judged(plan.goals, baseline, baseline)
        tell("no steering: " + ", ".join(f"{k} {v:.2f}" for k, v in base.items() if v is not None))
        study.work(meter, baseline, tell=tell, wait=not request.join)
        if request.join:
            return None
        with study.alone("conclusion"):
            return _conclude(request, plan, study, meter, baseline, identity, tell)


def _conclude(
    request: Request,
    plan: Plan,
    study: TuningStudy,
    meter: Meter,
    baseline: Score,
    identity: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Outcome:
    goals, folder = plan.goals, request.output
    trials = study.trials()
    write_rows(folder / "trials.jsonl", map(trial_row, trials))
    base = judged(goals, baseline, baseline)
    chosen = choose(study, goals, base, plan.options.choose, request.choice)
    methods = study.methods_of(chosen)
    resampling = {"n_resamples": request.n_resamples}
    shown = {t.number: t for t in (*study.front(), chosen)}
    entries = {
        number: describe(goals, score_of(trial), baseline, **resampling)
        for number, trial in shown.items()
    }
    unsteered = describe(goals, baseline, baseline, **resampling)
    tell(f"trial {chosen.number} is chosen; confirming it on images that no trial has seen")
    evaluations = confirm(meter, methods, folder / "confirm", seed=plan.options.seed, **resampling)
    held_out = confirmed(goals, evaluations, folder / "confirm")
    rows = [
        ("no steering", {name: {**e, "difference": None} for name, e in unsteered.items()}),
        *((_label(number, shown[number], chosen), e) for number, e in entries.items()),
    ]
    title = f"The front of {len(trials)} trials, on the images that were tuned on"
    said = verdict(goals, held_out)
    winner = folder / WINNER_NAME
    write_winner(
        winner,
        methods,
        [
            *provenance(plan, identity, meter.material.n_images, chosen.number, len(trials)),
            "On the images that chose it, which flatter it:",
            *(f"  {line}" for line in spoken(entries[chosen.number])),
            "On held-out images:",
            *(f"  {line}" for line in said),
        ],
    )
    blocks = front_blocks(goals, rows, title, said)
    for evaluation in evaluations.values():
        blocks += evaluation.blocks
    page = Report(f"Tuning of {plan.options.model}", plan.path.name, blocks)
    write_text(folder / "report.html", render_html(page))
    text = render(
        front_table(goals, rows, title),
        "",
        *(evaluation.table for evaluation in evaluations.values()),
        f"Held-out images, trial {chosen.number} against no steering:",
        *(f"  {line}" for line in said),
        width=_WIDTH,
    )
    summary = {
        "identity": dict(identity),
        "goals": {
            "objectives": {o.metric: o.direction for o in goals.objectives},
            "constraints": [str(constraint) for constraint in goals.constraints],
        },
        "baseline": unsteered,
        "front": {str(number): entry for number, entry in entries.items()},
        "chosen": {
            "trial": chosen.number,
            "parameters": chosen.params,
            "methods": dump(methods),
            "by": "the user" if request.choice is not None else plan.options.choose,
        },
        "held_out": held_out,
        "n_trials": len(trials),
        "n_images": meter.material.n_images,
        "left_out": list(meter.material.left_out),
    }
    write_json(folder / "tune.json", summary)
    write_text(folder / "table.txt", text)
    return Outcome(summary, text, winner)


def _label(number: int, trial: Any, chosen: Any) -> str:
    setting = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in trial.params.items()
    )
    mark = " *" if number == chosen.number else ""
    return f"{number}{mark}: {setting}"


def _refuse_on_model(plan: Plan, model: Any, processor: Any) -> None:
    """Attach the ends of every range, so that a refusal comes before the first trial."""
    for methods in plan.space.corners():
        try:
            vlm_steer.attach(model, methods, processor=processor).detach()
        except SteerError as error:
            raise ConfigError(
                f"{plan.path}: {plan.options.model} refuses {dump(methods)['methods']}: {error}"
            ) from error


def _identity(plan: Plan, material: Material, model: Any) -> dict[str, Any]:
    """Everything that the study's numbers depend on."""
    parts = {
        "space": list(plan.space.written),
        "objectives": plan.options.objectives,
        "constraints": plan.options.constraints,
        "data": material.digest,
        "sources": dict(material.sources),
        "tokens": dict(material.tokens),
        "generation": plan.options.generation,
        "model": model_fingerprint(model, plan.options.model),
        "versions": {**versions(), "optuna": require_optuna().__version__},
    }
    return {**parts, "study": content_key(parts)}


@contextmanager
def _helpers(request: Request) -> Iterator[None]:
    """The other processes of `workers`, which join the study and are awaited."""
    if request.workers < 2:
        yield
        return
    threads = max(1, (os.cpu_count() or 1) // request.workers)
    torch.set_num_threads(threads)
    context = multiprocessing.get_context("spawn")
    helpers = [
        context.Process(target=_help, args=(request, threads), daemon=True)
        for _ in range(request.workers - 1)
    ]
    for helper in helpers:
        helper.start()
    try:
        yield
    except BaseException:
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        for helper in helpers:
            helper.join()


def _help(request: Request, threads: int) -> None:
    torch.set_num_threads(threads)
    tune(replace(request, workers=1, join=True))
