"""Makes every test offline, single-threaded and seeded."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from typing import Any, NoReturn

import hypothesis
import numpy as np
import pytest

# How long one example takes says nothing about a claim on a machine that does other work too.
# A run is about a change: same examples each time; `--hypothesis-profile explore` draws new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("repeatable")

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import of huggingface_hub, hence before any fixture


class NetworkBlocked(RuntimeError):
    """A test tried to reach the network."""


def _refuse(*target: Any, **options: Any) -> NoReturn:
    raise NetworkBlocked(f"tests are offline, but this one tried to reach {target}")


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """Refuses name look-ups and connections; Unix sockets stay usable (multiprocessing)."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            _refuse(address)
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        patch.setattr(socket.socket, "connect_ex", _refuse)
        patch.setattr(socket, "getaddrinfo", _refuse)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on many threads, and sums would depend on their number."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test draw from the global state)
    torch.manual_seed(0)
