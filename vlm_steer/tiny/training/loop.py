"""Running the stages: batches ahead of time, checkpoints, a log, a progress bar."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_steer.errors import ConfigError
from vlm_steer.tiny.model import build_model, build_processor, save
from vlm_steer.tiny.training.checkpoint import Place, place, restore, restore_optimizers, store
from vlm_steer.tiny.training.optim import cosine, optimizers
from vlm_steer.tiny.training.sinks import Sinks
from vlm_steer.tiny.training.stages import Network, Stage, stages

__all__ = ["Recipe", "train"]

CHECKPOINT = "checkpoint.safetensors"
_LOG_EVERY = 20


@dataclass(frozen=True)
class Recipe:
    """What determines the weights.

    Attributes:
        seed: seed of the initial weights and of every batch.
        steps: updates in the vision, language, projector and instruction stages.
        bfloat16: whether matrix products run in bfloat16.
        sinks: updates in a last stage that grows attention sinks; none in the model that ships.
        start: folder of a finished model whose weights are the initial ones; random otherwise.
    """

    seed: int = 0
    steps: tuple[int, int, int, int] = (900, 220, 80, 1000)
    bfloat16: bool = False
    sinks: int = 0
    start: str | None = None


@dataclass(frozen=True)
class Run:
    """How a recipe is carried out; none of this changes the weights beyond rounding.

    Attributes:
        output: folder of the checkpoint, the log and the finished model.
        device: where the model is trained.
        checkpoint_every: updates between two checkpoints.
        workers: processes that make batches ahead; 0 makes them in this one.
    """

    output: Path
    device: torch.device
    checkpoint_every: int = 50
    workers: int = 1


def train(recipe: Recipe, run: Run) -> Path:
    """Train from scratch, or go on from the checkpoint in the output folder.

    Args:
        recipe: what is trained.
        run: where and how.

    Returns:
        The folder of the finished model, which ``from_pretrained`` loads.

    Raises:
        ConfigError: the checkpoint in the output folder belongs to another recipe.
    """
    run.output.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = Network(build_model(processor))
    if recipe.start:
        finished = LlavaForConditionalGeneration.from_pretrained(recipe.start, dtype=torch.float32)
        network.model.load_state_dict(finished.state_dict())
    network.to(run.device)
    resumed = _resume(recipe, run, network)
    planned = stages(processor, seed=recipe.seed, steps=recipe.steps)
    planned.append(Sinks(processor, seed=recipe.seed, steps=recipe.sinks))
    for number, stage in enumerate(planned):
        if resumed.stage <= number:
            done = resumed.step if resumed.stage == number else 0
            _run_stage(recipe, run, network, stage, number=number, done=done)
    return _finish(run, network, processor)


def _resume(recipe: Recipe, run: Run, network: Network) -> Place:
    path, settings = run.output / CHECKPOINT, json.dumps(asdict(recipe))
    if not path.exists():
        return Place(0, 0, settings)
    found = place(path)
    if found.recipe != settings:
        raise ConfigError(
            f"{path} was written by {found.recipe}, this run is {settings}: use the same settings "
            "to go on, or an empty output folder to start anew"
        )
    restore(path, network)
    return found


def _run_stage(
    recipe: Recipe, run: Run, network: Network, stage: Stage, *, number: int, done: int
) -> None:
    path, settings = run.output / CHECKPOINT, json.dumps(asdict(recipe))
    network.requires_grad_(requires_grad=False)
    trained = stage.parameters(network)
    for parameter in trained.values():
        parameter.requires_grad_()
    engines = optimizers(trained, matrix_lr=stage.matrix_lr, other_lr=stage.other_lr)
    rates = [engine.param_groups[0]["lr"] for engine in engines]
    if done:
        restore_optimizers(path, engines)
    started, used = time.monotonic(), _cpu_seconds()
    progress = tqdm(total=stage.steps, initial=done, desc=stage.name, mininterval=1.0)
    for step, batch in zip(range(done, stage.steps), _batches(run, stage, done), strict=True):
        for engine, rate in zip(engines, rates, strict=True):
            factor = cosine(step, stage.steps, min(stage.warmup, stage.steps // 4))
            engine.param_groups[0]["lr"] = rate * factor
        with _precision(recipe, run.device):
            losses = stage.losses(network, _to(batch, run.device))
        losses["loss"].backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for engine in engines:
            engine.step()
            engine.zero_grad()
        progress.update()
        if step % _LOG_EVERY == 0 or step + 1 == stage.steps:
            values = {name: round(float(loss.detach()), 4) for name, loss in losses.items()}
            progress.set_postfix(values)
            times = {"wall": time.monotonic() - started, "cpu": _cpu_seconds() - used}
            _log(run, {"stage": stage.name, "step": step + 1, **values, **times})
        if (step + 1) % run.checkpoint_every == 0 and step + 1 < stage.steps:
            store(path, Place(number, step + 1, settings), network, engines)
    progress.close()
    store(path, Place(number + 1, 0, settings), network, [])


class _Steps(Dataset[Any]):
    """The batches of a stage, addressed by step."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __getitem__(self, step: int) -> Any:
        return self.stage.batch(step)

    def __len__(self) -> int:
        return self.stage.steps


def _batches(run: Run, stage: Stage, done: int) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        _Steps(stage),
        batch_size=None,
        sampler=range(done, stage.steps),
        num_workers=run.workers,
        prefetch_factor=4 if run.workers else None,
    )
    return iter(loader)


def _to(batch: Any, device: torch.device) -> Any:
    """Move a NamedTuple of tensors, nested or not."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    return type(batch)(*(_to(member, device) for member in batch))


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.bfloat16)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _log(run: Run, entry: dict[str, Any]) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}
    with (run.output / "log.jsonl").open("a") as log:
        log.write(json.dumps(rounded) + "\n")


def _finish(run: Run, network: Network, processor: LlavaProcessor) -> Path:
    directory = run.output / "model"
    network.requires_grad_(requires_grad=True)
    network.eval()
    save(network.model, processor, directory)
    return directory
