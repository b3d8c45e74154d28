"""Which parts of a picture a text is about, by an image-text matching model such as CLIP."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_steer import functional as F
from vlm_steer.errors import ConfigError, UnsupportedModelError

__all__ = ["Match", "Matcher"]


class Match(NamedTuple):
    """How pictures match a text.

    Attributes:
        relevance: Per picture ``[height, width]`` float32, >= 0, on the grid asked for.
        similarity: Cosine of picture and text, of the picture that matches best.
    """

    relevance: tuple[Tensor, ...]
    similarity: float


@dataclass(frozen=True, eq=False)
class Matcher:
    """A dual encoder of transformers, CLIP or SigLIP for example.

    Attributes:
        model: The model, with ``get_image_features`` and ``get_text_features``.
        tokenizer: Its tokenizer.
        mean: What is taken off each channel of a picture.
        std: What each channel is then divided by.
        side: Side of the square pictures that it takes.
    """

    model: Any
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int

    @classmethod
    def load(cls, name: str | os.PathLike[str], device: torch.device | None = None) -> "Matcher":
        """Load one by folder or hub id.

        Raises:
            ConfigError: There is no such model, or it is no dual encoder over square pictures.
        """
        from transformers import AutoModel, AutoTokenizer
        from transformers.image_processing_base import ImageProcessingMixin

        name = os.fspath(name)
        try:
            with torch.inference_mode(False):
                model = AutoModel.from_pretrained(name).to(device).eval().requires_grad_(False)
            tokenizer = AutoTokenizer.from_pretrained(name)
            pixels, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"no matching model could be loaded from {name!r} ({reason[0]}). Give the folder "
                "or the hub id of a dual encoder such as openai/clip-vit-large-patch14-336."
            ) from error
        side = getattr(getattr(model.config, "vision_config", None), "image_size", None)
        encodes = all(hasattr(model, f"get_{kind}_features") for kind in ("image", "text"))
        if not encodes or not isinstance(side, int) or "image_mean" not in pixels:
            raise ConfigError(
                f"{name!r} is a {type(model).__name__}, which does not match square pictures with "
                "texts. Give a dual encoder such as openai/clip-vit-large-patch14-336."
            )
        mean, std = (tuple(pixels[key]) for key in ("image_mean", "image_std"))
        return cls(model=model, tokenizer=tokenizer, mean=mean, std=std, side=side)

    def match(
        self, pictures: Sequence[Tensor], text: str, shapes: Sequence[tuple[int, int]]
    ) -> Match:
        """Find what a text is about, by Grad-CAM over the last layer of the vision encoder.

        Args:
            pictures: ``[channels, height, width]`` in [0, 1] each; their aspect ratio is kept.
            text: The text; what is longer than the model takes is cut.
            shapes: Height and width of the grid on which to give the relevance of each picture.

        Raises:
            UnsupportedModelError: The states of the vision encoder form no square grid.
        """
        device = self.model.device
        # Gradients are needed here, whatever is off around.
        with torch.inference_mode(False), torch.enable_grad():
            pixels = torch.stack([self._squared(p.to(device).clone()) for p in pictures])
            with _Kept(_last_layer(self.model)) as kept:
                seen = _features(self.model.get_image_features(pixel_values=pixels))
            read = _features(self.model.get_text_features(**self._tokens([text])))
            similarity = functional.cosine_similarity(seen.float(), read.detach().float(), dim=-1)
            (gradient,) = torch.autograd.grad(similarity.sum(), kept.states)
            relevance = F.token_relevance(kept.states.detach(), gradient)
        maps = [
            _on_grid(_as_square(tokens), picture.shape[-2:], shape)
            for tokens, picture, shape in zip(relevance, pictures, shapes, strict=True)
        ]
        return Match(tuple(maps), float(similarity.max()))

    def similarities(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """How texts match pictures.

        Args:
            pictures: ``[channels, height, width]`` in [0, 1] each; their aspect ratio is kept.
            texts: The texts; what is longer than the model takes is cut.

        Returns:
            ``[texts]`` float32, cosine of each with the picture that it matches best.
        """
        with torch.inference_mode():
            pixels = torch.stack([self._squared(p.to(self.model.device)) for p in pictures])
            seen = _features(self.model.get_image_features(pixel_values=pixels)).float()
            read = _features(self.model.get_text_features(**self._tokens(texts))).float()
            cosine = functional.cosine_similarity(seen[None], read[:, None], dim=-1)
        return cosine.amax(dim=1).cpu()

    def _squared(self, picture: Tensor) -> Tensor:
        """A picture as the model takes it, fitted into its square and surrounded by the mean."""
        height, width = _fitted(picture.shape[-2:], self.side)
        resized = functional.interpolate(
            picture[None].float(), (height, width), mode="bicubic", antialias=True
        )[0].clamp(0, 1)
        mean, std = (
            resized.new_tensor(numbers)[:, None, None] for numbers in (self.mean, self.std)
        )
        below, right = self.side - height, self.side - width
        padded = functional.pad((resized - mean) / std, (0, right, 0, below))
        return padded.to(self.model.dtype)

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [text.lower() for text in texts],
            truncation=True,
            padding="max_length",  # SigLIP has seen no other
            max_length=longest,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask")
        return {name: tokens[name].to(self.model.device) for name in names if name in tokens}


class _Kept:
    """Keeps what enters a layer, as the leaf of a graph."""

    def __init__(self, layer: nn.Module):
        self._layer = layer
        self.states = torch.empty(0)

    def __enter__(self) -> "_Kept":
        self._handle = self._layer.register_forward_pre_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _keep(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        self.states = states.detach().requires_grad_()
        if args:
            return (self.states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.states}


def _last_layer(model: Any) -> nn.Module:
    vision = getattr(model, "vision_model", model)
    lists = [module for module in vision.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)[-1]


def _features(output: Any) -> Tensor:
    features: Tensor = getattr(output, "pooler_output", output)
    return features


def _fitted(size: Sequence[int], side: int) -> tuple[int, int]:
    """Height and width of a picture whose longer side is ``side``."""
    scale = side / max(size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _as_square(tokens: Tensor) -> Tensor:
    """``[side, side]`` from the tokens of one picture, a class token in front left out."""
    side = int(tokens.shape[0] ** 0.5)
    if tokens.shape[0] - side * side not in (0, 1):
        raise UnsupportedModelError(
            f"the matching model has {tokens.shape[0]} vision tokens, which form no square grid. "
            "Use another one, such as CLIP."
        )
    return tokens[-side * side :].reshape(side, side)


def _on_grid(square: Tensor, size: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """Means over the cells of the grid of a picture that fills the upper left of a square."""
    # Fine enough that every cell of either grid holds several pixels.
    fine = 4 * max(square.shape[0], *shape)
    enlarged = functional.interpolate(square[None, None], (fine, fine), mode="bilinear")
    height, width = _fitted(size, fine)
    return functional.adaptive_avg_pool2d(enlarged[..., :height, :width], shape)[0, 0]
