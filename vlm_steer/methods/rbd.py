"""RBD: a textual and a visual stream rebalance the prediction."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import Branch, LogitsAt
from vlm_steer.methods._noise import noised_images
from vlm_steer.methods._pruning import Pruned
from vlm_steer.registry import register_method

__all__ = ["RBD"]


@register_method("rbd")
@dataclass(frozen=True, kw_only=True)
class RBD(Pruned):
    """Re-balancing contrastive decoding (a reconstruction): less of the text, more of the image.

    With l the logits, n_text those of a stream whose image is noised, so that it leans on the
    text, and n_vis those of a stream that sees, from an early layer on, only the image tokens
    that its predicting row attends most (after arXiv 2409.06485)::

        l := (1 + alpha - gamma) * l - alpha * n_text + gamma * n_vis,
        kept where l >= log(beta) + max(l)

    Deviations: this is a reconstruction. The paper describes the two streams, and neither its
    formula nor code nor numbers were available; the noise is that of VCD, the choice of tokens
    the opposite of SID's, and the weights are ours.

    Cost: two extra streams, one of which encodes the noised image.

    Attributes:
        alpha: Weight of the textual stream, taken off, >= 0. Sensible 0.25 to 1.
        gamma: Weight of the visual stream, put on, >= 0. Sensible 0.25 to 1.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.
        noise_step: Diffusion step of the noised image, 0 to 999. Sensible 300 to 999.
        seed: Seed of the noise.
        keep: Image tokens that the visual stream sees: a fraction, above 0 and below 1, or a
            number. Sensible 0.1 to 0.5.
        layers: Decoder layers in which it sees no others. The layer before the first of them
            chooses, so layer 0 always sees all.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("rbd")(gamma=0.25).gamma
        0.25

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2409.06485"
    own: ClassVar[dict[str, str]] = {"choose": "visual", "mask": "visual"}
    largest: ClassVar[bool] = True

    alpha: float = 0.5
    gamma: float = 0.5
    beta: float = 0.1
    noise_step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "gamma"):
            value = getattr(self, name)
            self.require(value >= 0, f"{name} is {value}; it must be at least 0")
        self.require(0 <= self.beta <= 1, f"beta is {self.beta}; it must lie in [0, 1]")
        self.require(
            0 <= self.noise_step < 1000, f"noise_step is {self.noise_step}; it must lie in [0, 999]"
        )

    def is_neutral(self) -> bool:
        return self.alpha == 0 and self.gamma == 0 and self.beta == 0

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.alpha == 0:
            ignored |= dict.fromkeys(("noise_step", "seed"), "alpha is 0, so nothing is noised")
        if self.gamma == 0:
            ignored |= dict.fromkeys(("keep", "layers"), "gamma is 0, so nothing is pruned")
        return ignored

    def branches(self) -> tuple[Branch, ...]:
        noise = partial(noised_images, step=self.noise_step, seed=self.seed)
        textual, visual = Branch("noised", pixels=noise), Branch("visual")
        return (textual,) * (self.alpha > 0) + (visual,) * (self.gamma > 0)

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        for name, weight in (("noised", -self.alpha), ("visual", self.gamma)):
            if weight != 0:
                # A token about which the other stream has no opinion is left as it is.
                other = torch.where(at.branches[name].isfinite(), at.branches[name], at.raw)
                logits = F.add_change(logits, at.raw, (1 - weight) * at.raw + weight * other)
        return logits

    def plausible(self, at: LogitsAt) -> Tensor | None:
        return F.plausibility_mask(at.raw, beta=self.beta) if self.beta > 0 else None
