"""VCD: contrast with the prediction for a noised image."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from vlm_steer.engine.hooks import Branch
from vlm_steer.methods._contrast import Contrast
from vlm_steer.methods._noise import noised_images
from vlm_steer.registry import register_method

__all__ = ["VCD"]


@register_method("vcd")
@dataclass(frozen=True, kw_only=True)
class VCD(Contrast):
    """Visual contrastive decoding: subtract what the model says of a noised image.

    With l the logits for the image and n those for the image after ``noise_step`` steps of
    forward diffusion (arXiv 2311.16922, eqs. 2 to 4)::

        l := (1 + alpha) * l - alpha * n,   kept where l >= log(beta) + max(l)

    Deviations of the official code: it acts under sampling only and is silently ignored under
    greedy decoding; its POPE script uses ``beta`` 0.2 and ``noise_step`` 500 where the paper
    reports 0.1 and 999; its noise is drawn anew for every question. Here noise is a function of
    the image and ``seed``, so questions about one image, resumed runs and any batch order see the
    same noise.

    Cost: one extra stream, and one more encoding of the image.

    Attributes:
        alpha: Strength of the contrast, >= 0. Sensible 0.25 to 2.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.
        noise_step: Diffusion step of the noised image, 0 to 999. Sensible 300 to 999.
        seed: Seed of the noise.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("vcd")(noise_step=700).noise_step
        700

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2311.16922"

    branch: ClassVar[str] = "noised"

    noise_step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            0 <= self.noise_step < 1000, f"noise_step is {self.noise_step}; it must lie in [0, 999]"
        )

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.alpha == 0:
            ignored |= dict.fromkeys(("noise_step", "seed"), "alpha is 0, so there is no contrast")
        return ignored

    def branches(self) -> tuple[Branch, ...]:
        if self.alpha == 0:
            return ()
        return (
            Branch("noised", pixels=partial(noised_images, step=self.noise_step, seed=self.seed)),
        )
