"""Steering vectors on disk: one direction per layer, and what they were made of."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_steer.calibration import are_other_weights, weights_sample
from vlm_steer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["Directions"]

_KEY, _VISUAL = "directions", "visual"
_FORMAT = "vlm_steer.directions/1"


@dataclass(frozen=True, eq=False)
class Directions:
    """One direction per decoder layer, and perhaps one per layer of the vision tower.

    Attributes:
        vectors: ``[layers, hidden]`` float32.
        method: The method they were made for.
        family: ``model_type`` of the model they were made on.
        made_of: What they were made of, as plain data.
        visual: ``[vision layers, vision hidden]`` float32, or ``None``.
        weights: ``vlm_steer.calibration.weights_sample`` of that model, or ``None``.
    """

    vectors: Tensor
    method: str
    family: str
    made_of: dict[str, object]
    visual: Tensor | None = None
    weights: list[float] | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a safetensors file."""
        metadata = {
            "format": _FORMAT,
            "method": self.method,
            "family": self.family,
            "made_of": json.dumps(self.made_of),
            "weights": json.dumps(self.weights),
        }
        named = {_KEY: self.vectors} | ({} if self.visual is None else {_VISUAL: self.visual})
        tensors = {name: v.detach().float().cpu().contiguous() for name, v in named.items()}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Directions":
        """Read what ``save`` wrote.

        Raises:
            DataError: There is no such file, or it holds something else.
        """
        name = os.fspath(path)
        if not Path(path).is_file():
            raise DataError(f"directions {name} do not exist. Make them with vlm-steer build.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = set(file.keys())
                if metadata.get("format") != _FORMAT or names not in ({_KEY}, {_KEY, _VISUAL}):
                    raise DataError(
                        f"{name} holds no directions of vlm-steer (format "
                        f"{metadata.get('format')!r} instead of {_FORMAT!r}). Make them with "
                        "vlm-steer build."
                    )
                tensors = {name: file.get_tensor(name).float() for name in names}
        except SafetensorError as error:
            raise DataError(f"{name} is no safetensors file, or is damaged: {error}.") from error
        for vectors in tensors.values():
            if vectors.ndim != 2 or not bool(torch.isfinite(vectors).all()):
                raise DataError(
                    f"{name} holds a tensor of shape {list(vectors.shape)} or with values that are "
                    "not finite; directions are finite and of shape [layers, hidden]."
                )
        return cls(
            vectors=tensors[_KEY],
            visual=tensors.get(_VISUAL),
            method=metadata.get("method", ""),
            family=metadata.get("family", ""),
            made_of=json.loads(metadata.get("made_of", "{}")),
            weights=json.loads(metadata.get("weights", "null")),
        )

    def check(self, method: str, model: "ModelInfo") -> None:
        """Refuse a model or a method that these directions were not made for.

        Raises:
            ConfigError: They were made for another method, family, size or weights.
        """
        size = (model.n_layers, int(model.text_config.hidden_size))
        mine = (self.method, self.family, *self.vectors.shape)
        if mine != (method, model.family, *size):
            raise ConfigError(
                f"{method}: these directions were made for {self.method} on {self.family} with "
                f"{self.vectors.shape[0]} layers of {self.vectors.shape[1]}, but this is {method} "
                f"on {model.family} with {size[0]} layers of {size[1]}. Make them anew with "
                "vlm-steer build."
            )
        if are_other_weights(self.weights, weights_sample(model)):
            raise ConfigError(
                f"{method}: these directions were made on a model of the same shape with other "
                "weights. Make them anew with vlm-steer build."
            )

    def check_visual(self, method: str, model: "ModelInfo") -> Tensor:
        """The directions of the vision tower, ``[layers, hidden]``.

        Raises:
            ConfigError: There are none, or they were made for another vision tower.
        """
        if self.visual is None:
            raise ConfigError(
                f"{method}: these directions hold none for the vision tower. Make them anew with "
                "vlm-steer build vti --visual-trials 50."
            )
        n_layers = len(model.vision_layers)
        if self.visual.shape[0] != n_layers:
            raise ConfigError(
                f"{method}: these directions are for a vision tower of {self.visual.shape[0]} "
                f"layers, but this one has {n_layers}. Make them anew with vlm-steer build vti."
            )
        return self.visual
