"""Corrupting an image on purpose (VCD)."""

import torch
from torch import Tensor

from vlm_steer.errors import ConfigError
from vlm_steer.functional._numeric import upcast

_STEPS = 1000
_BETA_FIRST, _BETA_LAST = 1e-5, 5e-3  # ends of the schedule in VCD's vcd_add_noise.py


def diffusion_noise(pixel_values: Tensor, noise: Tensor, *, step: int) -> Tensor:
    """Noises normalised pixels as the forward process of a diffusion model does (VCD).

    `sqrt(abar) * x + sqrt(1 - abar) * noise` with abar the product of `1 - beta_i` for i up to
    and including `step`, over 1000 betas that rise from 1e-5 to 5e-3 along a sigmoid on [-6, 6]
    (official code of arXiv 2311.16922). Step 0 is noised already; `sqrt(abar)` is 0.863 at
    step 500 and 0.285 at step 999.

    Args:
        pixel_values: what the processor returned, any shape, float.
        noise: draws from N(0, 1), same shape: the caller owns the seed.
        step: in [0, 999].

    Returns:
        Noised pixels, shape and dtype of `pixel_values`.

    Raises:
        ConfigError: `step` is outside the schedule.
    """
    if not 0 <= step < _STEPS:
        raise ConfigError(f"noise step {step} is outside the schedule; choose 0 to {_STEPS - 1}")
    x = upcast(pixel_values)
    ramp = torch.linspace(-6, 6, _STEPS, device=x.device, dtype=x.dtype).sigmoid()
    betas = ramp * (_BETA_LAST - _BETA_FIRST) + _BETA_FIRST
    kept = (1 - betas[: step + 1]).prod()
    return (kept.sqrt() * x + (1 - kept).sqrt() * upcast(noise)).to(pixel_values.dtype)
