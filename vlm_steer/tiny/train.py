"""Train the embedded model from scratch: ``python -m vlm_steer.tiny.train --output DIR --seed 0``.

A run that was stopped, in whatever way, goes on where it was when the command is repeated.
"""

import argparse
from pathlib import Path

import torch

from vlm_steer.tiny.training.loop import Recipe, Run, train

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train.

    Args:
        arguments: the command line, that of the process unless given.
    """
    default = Recipe()
    parser = argparse.ArgumentParser(prog="python -m vlm_steer.tiny.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of everything written")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--device", help="default: cuda if there is one, otherwise cpu")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=4,
        default=default.steps,
        metavar=("VISION", "LANGUAGE", "PROJECTOR", "INSTRUCTIONS"),
        help="updates per stage",
    )
    parser.add_argument(
        "--sinks", type=int, default=default.sinks, help="updates that grow attention sinks"
    )
    parser.add_argument("--start", help="folder of a finished model to go on from; see --steps")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="updates")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches ahead")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe = Recipe(
        chosen.seed,
        tuple(chosen.steps),
        bfloat16=_has_fast_bfloat16(device),
        sinks=chosen.sinks,
        start=chosen.start,
    )
    train(recipe, Run(chosen.output, device, chosen.checkpoint_every, chosen.workers))


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # A processor without the instructions emulates them, three times slower than float32; older
    # releases of torch cannot tell.
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


if __name__ == "__main__":
    main()
