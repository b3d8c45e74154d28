"""SID: contrast with a stream that sees the least attended image tokens only."""

from dataclasses import dataclass
from typing import ClassVar

from vlm_steer.engine.hooks import Branch
from vlm_steer.methods._contrast import Contrast
from vlm_steer.methods._pruning import Pruned
from vlm_steer.registry import register_method

__all__ = ["SID"]


@register_method("sid")
@dataclass(frozen=True, kw_only=True)
class SID(Pruned, Contrast):
    """Self-introspective decoding: subtract what the model says when it sees the wrong tokens.

    A second stream reads the same prompt. From layer K on, all its rows see, of the image, only
    the tokens that its predicting row attended least one layer earlier, on average over heads;
    they are chosen anew at every generated token. With n the logits of that stream
    (arXiv 2408.02032)::

        l := (1 + alpha) * l - alpha * n,   kept where l >= log(beta) + max(l)

    Deviations of the official code: its greedy decoding leaves the plausibility threshold out;
    the strength that takes effect is 0.5, since the 1 of its command line is not passed on; the
    commands that it gives for VCD and ICD run SID. Its layer 2 and 100 tokens of 576 are the
    fractions below; it says to save computation and does not, since tokens are masked, not
    dropped, here as there.

    Cost: one extra stream over the same encoded image, one attention row in one layer, and a
    materialised mask in that stream.

    Attributes:
        alpha: Strength of the contrast, >= 0. Sensible 0.25 to 2.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.
        keep: Image tokens that the second stream sees: a fraction, above 0 and below 1, or a
            number. Sensible 0.05 to 0.2.
        layers: Decoder layers in which it sees no others. The layer before the first of them
            chooses, so layer 0 always sees all.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("sid")(keep=50).keep
        50

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2408.02032"
    branch: ClassVar[str] = "pruned"
    own: ClassVar[dict[str, str]] = {"choose": "pruned", "mask": "pruned"}

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.alpha == 0:
            why = "alpha is 0, so there is no contrast"
            ignored |= dict.fromkeys(("keep", "layers"), why)
        return ignored

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(self.branch),) if self.alpha > 0 else ()
