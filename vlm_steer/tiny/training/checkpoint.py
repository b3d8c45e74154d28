"""Checkpoints that survive being killed at any moment."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm_steer.errors import DataError

__all__ = ["Place", "place", "restore", "restore_optimizers", "store"]


class Place(NamedTuple):
    """How far a run has come.

    Attributes:
        stage: number of the stage that the run is in.
        step: steps of that stage that are done.
        recipe: the settings of the run as text; another text cannot be resumed.
    """

    stage: int
    step: int
    recipe: str


def store(
    path: Path, place: Place, network: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Write a checkpoint; the old one stays until the new one is complete on disk."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for slot, state in optimizer.state_dict()["state"].items():
            for name, tensor in state.items():
                tensors[f"optimizer.{number}.{slot}.{name}"] = tensor
    metadata = {"stage": str(place.stage), "step": str(place.step), "recipe": place.recipe}
    partial = path.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)


def place(path: Path) -> Place:
    """Read how far the run of a checkpoint has come."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return Place(int(metadata["stage"]), int(metadata["step"]), metadata["recipe"])


def restore(path: Path, network: nn.Module) -> None:
    """Load the weights of a checkpoint.

    Raises:
        DataError: the checkpoint belongs to another architecture.
    """
    with safe_open(path, framework="pt") as file:
        state = {
            name.removeprefix("network."): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - the file is no mapping
            if name.startswith("network.")
        }
    if state.keys() != network.state_dict().keys():
        raise DataError(
            f"{path} holds other weights than this version trains: choose an empty output folder"
        )
    network.load_state_dict(state)


def restore_optimizers(path: Path, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load the optimizer states of a checkpoint that was written in the middle of a stage."""
    with safe_open(path, framework="pt") as file:
        saved: dict[int, dict[int, dict[str, Tensor]]] = {}
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            if key.startswith("optimizer."):
                _, number, slot, name = key.split(".")
                states = saved.setdefault(int(number), {})
                states.setdefault(int(slot), {})[name] = file.get_tensor(key)
    for number, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        whole["state"] = saved.get(number, {})
        optimizer.load_state_dict(whole)
