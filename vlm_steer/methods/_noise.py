"""Images noised by a function of their content and a seed."""

import hashlib

import torch
from torch import Tensor

from vlm_steer import functional as F

__all__ = ["noised_images"]


def noised_images(pixels: Tensor, sizes: tuple[int, ...] | None, *, step: int, seed: int) -> Tensor:
    """Noise every image by itself.

    Args:
        pixels: ``[images, ...]``, ``[rows, tiles, channels, height, width]``, or patches of all
            images one after the other.
        sizes: For patches, how many belong to each image.
        step: Diffusion step.
        seed: Seed of the noise.
    """
    if sizes is not None:
        images = list(torch.split(pixels, list(sizes)))
    elif pixels.ndim == 5:
        images = list(pixels.flatten(0, 1))
    else:
        images = list(pixels)
    noise = [_noise(image, seed) for image in images]
    stacked = torch.cat(noise) if sizes is not None else torch.stack(noise)
    noised = F.diffusion_noise(pixels.float(), stacked.reshape(pixels.shape), step=step)
    # Images that are zero throughout are padding, which some models recognise by just that.
    is_padding = [not bool(image.any()) for image in images]
    if any(is_padding):
        kept = torch.cat([torch.full_like(i, p) for i, p in zip(images, is_padding, strict=True)])
        noised = torch.where(kept.reshape(pixels.shape).bool(), pixels.float(), noised)
    return noised.to(pixels.dtype)


def _noise(image: Tensor, seed: int) -> Tensor:
    """Standard normal noise that depends on the image's content and the seed alone."""
    content = image.detach().float().cpu().contiguous()
    digest = hashlib.sha256(content.numpy().tobytes() + seed.to_bytes(8, "little", signed=True))
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "little") >> 1)
    return torch.randn(content.shape, generator=generator).to(image.device)
