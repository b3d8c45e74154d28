"""What generating a batch costs, counted from outside."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Measured", "measured"]


@dataclass
class Measured:
    """The cost of a block.

    Attributes:
        seconds: wall-clock time.
        passes: rows that went through the text decoder, summed over its calls: branches, beams and
            passes before generation count, however they are batched.
        memory: peak of allocated memory in bytes; None where there is no GPU to ask.
    """

    seconds: float = 0.0
    passes: int = 0
    memory: int | None = None


@contextmanager
def measured(decoder: torch.nn.Module, device: torch.device) -> Iterator[Measured]:
    """Measure what runs inside the block; filled in when it ends.

    Args:
        decoder: the model's text decoder.
        device: where the model lies.
    """
    cost = Measured()

    def count(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        tensors = (options.get("inputs_embeds"), options.get("input_ids"), *arguments)
        rows = next((tensor for tensor in tensors if isinstance(tensor, torch.Tensor)), None)
        cost.passes += 0 if rows is None else len(rows)

    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    handle = decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield cost
    finally:
        handle.remove()
        cost.seconds = time.perf_counter() - start
        if is_cuda:
            cost.memory = torch.cuda.max_memory_allocated(device)
