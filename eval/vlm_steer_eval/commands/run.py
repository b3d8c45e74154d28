"""What the commands that run a benchmark have in common."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.choices import NormaliserName

from .options import refuse_run

if TYPE_CHECKING:
    from vlm_steer_eval.benchmarks.chair import Normaliser
    from vlm_steer_eval.benchmarks.judge import Judge
    from vlm_steer_eval.benchmarks.pope_builder import Strategy
    from vlm_steer_eval.benchmarks.tasks import Task
    from vlm_steer_eval.running.parts import RemoteLogs
    from vlm_steer_eval.running.workers import Workers

    from .groups import RunOptions

__all__ = [
    "check_early",
    "chosen_judge",
    "chosen_normaliser",
    "chosen_splits",
    "refuse_on_scenes",
    "refuse_several_sources",
    "refuse_without_dataset",
    "required_folder",
    "run_and_show",
]

_SHOWN_FAILURES = 10
_WITHOUT_MODEL = ("model", "methods", "controls", "trivial", "deterministic", "repeat")


def run_and_show(task: "Task", run: "RunOptions", *, share_prefix: bool = False) -> None:
    """Load the model, run the benchmark, print its tables; results go to a folder or an address.

    Raises:
        DataError: items had to be left out because of their image, after everything else is done.
    """
    from vlm_steer_eval.running.parts import RemoteLogs, remote_url
    from vlm_steer_eval.running.workers import workers_from_environment

    if run.rescore is not None:
        _rescore(task, run, run.rescore)
        return
    workers = workers_from_environment()
    url = remote_url(run.output)
    if url is None:
        _run(task, run, workers, run.output, share_prefix=share_prefix)
        return
    logs = RemoteLogs(url)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run(task, run, workers, Path(folder), logs=logs, share_prefix=share_prefix)
        finally:
            logs.publish(Path(folder))
            if workers.is_main:
                logs.merge()


def _run(
    task: "Task",
    run: "RunOptions",
    workers: "Workers",
    output: Path,
    *,
    logs: "RemoteLogs | None" = None,
    share_prefix: bool,
) -> None:
    """One of several processes generates its share only, unless it is the main one."""
    from vlm_steer.commands.places import check_folder
    from vlm_steer.loading import load_model
    from vlm_steer_eval.files import write_json
    from vlm_steer_eval.running.pipeline import run_benchmark
    from vlm_steer_eval.running.repeat import parse_sizes, repeat_lines, repeat_run
    from vlm_steer_eval.running.runner import run_arms

    settings = run.settings()
    loading = run.loading()
    if workers.device is not None:
        if loading["device_map"] is not None:
            raise ConfigError(
                f"--device-map {loading['device_map']} cannot be combined with several processes, "
                "each of which has a device of its own; leave it out"
            )
        loading = {**loading, "device_map": workers.device}
    if run.repeat is not None and workers.size > 1:
        raise ConfigError("--repeat runs in one process; leave it out, or run it by itself")
    before = _provenance(output)
    check_folder(output)
    model, processor = load_model(run.model, **loading)
    shared: dict[str, Any] = {
        "model_name": run.model,
        "settings": settings,
        "batch_size": run.batch_size,
        "output": output,
        "share_prefix": share_prefix,
        "workers": workers,
        "logs": logs,
    }
    if not workers.is_main:
        run_arms(task, run.arms(), model, processor, **shared)
        return
    result = run_benchmark(
        task,
        run.arms(),
        model,
        processor,
        n_resamples=run.resamples,
        seed=run.seed,
        preset=run.applied,
        **shared,
    )
    typer.echo(result.table, nl=False)
    _tell_replaced(output, before, result.run.provenance)
    if run.repeat is not None:
        report = repeat_run(
            task,
            run.arms(),
            model,
            processor,
            result.run,
            parse_sizes(run.repeat, run.batch_size),
            **{name: value for name, value in shared.items() if name not in ("workers", "logs")},
        )
        write_json(output / "repeat.json", report)
        typer.echo("\n".join(repeat_lines(report)))
    _tell_where(task, run, result.run.failures, run.output if logs is None else logs.url)


def _provenance(output: Path) -> Mapping[str, Any]:
    """What the results in a folder came from; empty where there are none."""
    from vlm_steer_eval.files import read_json
    from vlm_steer_eval.running.runner import RUN_NAME

    path = output / RUN_NAME
    return dict(read_json(path)) if path.is_file() else {}


def _tell_replaced(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in ("model", "settings", "versions") if name in before]
    changed = [name for name in changed if before[name] != now[name]]
    if changed:
        typer.echo(
            f"note: {output} held results of other {' and '.join(changed)}, which these replace; "
            "the answers stay logged, so the earlier command gives its results again at once",
            err=True,
        )


def _rescore(task: "Task", run: "RunOptions", source: Path) -> None:
    """Score what a run has logged."""
    from vlm_steer_eval.files import write_json
    from vlm_steer_eval.running.parts import local_copy
    from vlm_steer_eval.running.pipeline import write_results
    from vlm_steer_eval.running.rescoring import logged_run
    from vlm_steer_eval.running.runner import RUN_NAME

    refuse_run(run.output, "generations.jsonl")
    with local_copy(source, (RUN_NAME, "generations*.jsonl")) as folder:
        logged = logged_run(task, folder)
    write_json(run.output / RUN_NAME, logged.provenance)
    result = write_results(
        task,
        logged,
        run.output,
        model_name=str(logged.provenance["model"]["name"]),
        n_resamples=run.resamples,
        seed=run.seed,
        preset=run.applied,
    )
    typer.echo(result.table, nl=False)
    _tell_where(task, run, logged.failures, run.output)


def _tell_where(
    task: "Task", run: "RunOptions", failures: Sequence[Mapping[str, str]], shown: object
) -> None:
    typer.echo(f"results: {shown}")
    for failure in failures[:_SHOWN_FAILURES]:
        typer.echo(f"note: left out {failure['item']}: {failure['error']}", err=True)
    if failures and not run.skip_bad_images:
        raise DataError(
            f"{len(failures)} of {len(task.items)} items were left out because of their image "
            f"(listed under 'excluded' in {shown}/scores.json); repair the images and run the same "
            "command again, which adds only what is missing, or accept the loss with "
            "--skip-bad-images"
        )


def check_early(run: "RunOptions") -> None:
    """Report a misspelt arm or contradictory settings before anything slow begins."""
    from vlm_steer_eval.running.repeat import parse_sizes

    run.arms()
    run.settings()
    if run.rescore is not None:
        written = [
            name for name in _WITHOUT_MODEL if getattr(run, name) != getattr(type(run), name)
        ]
        if written:
            raise ConfigError(
                f"--rescore takes the arms of a finished run as they are; leave out --{written[0]}"
            )
    if run.repeat is not None:
        parse_sizes(run.repeat, run.batch_size)
        if run.deterministic:
            raise ConfigError("--repeat has no effect with --deterministic, which takes one")


def chosen_splits(text: str) -> "list[Strategy]":
    """Splits of POPE named in an option, in their usual order.

    Raises:
        ConfigError: a name is unknown or occurs twice.
    """
    from vlm_steer_eval.benchmarks.pope_builder import STRATEGIES

    names = [part.strip() for part in text.split(",")]
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(f"--splits {text!r}: choose different ones of {', '.join(STRATEGIES)}")
    return [strategy for strategy in STRATEGIES if strategy in names]


def chosen_normaliser(
    normaliser: NormaliserName, synonyms: Path | None, lemmas: Path | None = None
) -> "Normaliser | None":
    """The normaliser that the options name; None for the default of the data."""
    if normaliser == "table" and synonyms is None and lemmas is None:
        return None
    from vlm_steer_eval.benchmarks.scoring import make_normaliser

    return make_normaliser(normaliser, synonyms, lemmas)


def chosen_judge(spec: str, output: Path) -> "Judge":
    """The judge that an option names; its replies are kept in the folder of the results."""
    from vlm_steer_eval.benchmarks.judge import load_judge
    from vlm_steer_eval.running.parts import remote_url

    if remote_url(output) is not None:
        raise ConfigError(
            f"--judge keeps replies in a file that grows, which --output {remote_url(output)} "
            "cannot hold; give a folder"
        )
    return load_judge(spec, output / "judge.jsonl")


def refuse_several_sources(**sources: object) -> None:
    """Raise `ConfigError` where more than one source of data is given."""
    given = [name for name, value in sources.items() if value]
    if len(given) > 1:
        raise ConfigError(f"give one source of data, not {' and '.join(given)}")


def refuse_without_dataset(dataset: str | None, **options: object) -> None:
    """Raise `ConfigError` for options that say how to read a data set, where there is none."""
    for name, value in options.items():
        if value and dataset is None:
            raise ConfigError(f"--{name} has no effect without --dataset")


def refuse_on_scenes(**options: object) -> None:
    """Raise `ConfigError` for options that cannot act on the embedded scenes."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"--{name} has no effect on the embedded scenes; give your own data with it, or "
                "leave it out"
            )


def required_folder(images: Path | None, option: str) -> Path:
    """The image folder, which `option` needs."""
    if images is None:
        raise ConfigError(f"{option} needs --images, the folder of the images")
    return images
