"""Processes that share one run: who this one is, and how it waits for the others.

`accelerate launch` starts the processes. What each of them generates is decided by the content of
the items, so that their number changes nothing but the time.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from vlm_steer.errors import ConfigError

__all__ = ["Workers", "workers_from_environment"]

_LONGEST_WAIT = timedelta(days=7)


def _nobody() -> None:
    """There is nobody to wait for."""


@dataclass(frozen=True)
class Workers:
    """This process among those of a run.

    Attributes:
        rank: number of this process, from 0; process 0 scores and writes the results.
        size: number of processes, > 0.
        device: where this process puts its model; None where the options decide.
        wait: returns once every process has called it.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None
    wait: Callable[[], None] = _nobody

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def part(self, name: str) -> str:
        """The name of this process's own part of a file."""
        stem, dot, suffix = name.rpartition(".")
        return name if self.is_main else f"{stem}-{self.rank:03d}{dot}{suffix}"


def workers_from_environment() -> Workers:
    """This process as `accelerate launch` (or `torchrun`) has started it; alone by default.

    Raises:
        ConfigError: the environment names a number of processes that is no number.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit():
        raise ConfigError(f"WORLD_SIZE is {size!r}; start several processes by accelerate launch")
    if int(size) <= 1:
        return Workers()
    import torch
    from accelerate import PartialState

    # Processes finish at different times, and none must give up on the others.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
    device = None if state.device.type == "cpu" else str(state.device)
    return Workers(state.process_index, state.num_processes, device, state.wait_for_everyone)
