"""What the layers of a model would have said in place of each token (nostalgebraist, 2020)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_steer.engine.hooks import LogitsAt, Method
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.explanation.checks import dictate

__all__ = ["Lens", "read_layers"]


@dataclass(frozen=True, eq=False)
class Lens:
    """Next-token probabilities read off every layer, at the rows that predict a text.

    The final norm and the output head of the model are applied to what each layer returns, after
    every hook of the steering. What a method does to logits comes later and is not in here.

    Attributes:
        layers: Decoder layers, in order.
        logprob: ``[tokens, layers]`` float32 log-probability of the token that was generated.
        best: ``[tokens, layers]`` int64, the likeliest token.
        names: What the tokens of ``best`` write.
    """

    layers: tuple[int, ...]
    logprob: Tensor
    best: Tensor
    names: Mapping[int, str]


def read_layers(
    model: Any, processor: Any, inputs: Mapping[str, Any], ids: Tensor, methods: Sequence[Method]
) -> tuple[Lens | None, str]:
    """Write a text again, token by token, and read every layer on the way.

    Returns:
        What was read, or why nothing was.
    """
    info = inspect_model(model)
    reader = _Reader(ids=ids)
    try:
        info.readout  # noqa: B018  # looked for, and verified, on first use
    except UnsupportedModelError as error:
        return None, str(error)
    dictate(model, processor, inputs, ids, (*methods, reader))
    missing = len(ids) - len(reader.seen)
    if missing:
        return None, f"{missing} of {len(ids)} tokens were written by a search of their own."
    logprob, best = (
        torch.stack([reader.seen[step][part] for step in range(len(ids))]).cpu() for part in (0, 1)
    )
    tokenizer = getattr(processor, "tokenizer", processor)
    names = {token: tokenizer.decode([token]) for token in set(best.flatten().tolist())}
    return Lens(tuple(sorted(info.layers)), logprob, best, names), ""


@dataclass(frozen=True, kw_only=True)
class _Reader(Method):
    """Reads a text that is dictated off every layer; changes nothing."""

    name: ClassVar[str] = "explain_lens"
    observer: ClassVar[bool] = True

    ids: Tensor
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def select_taps(self, model: Any) -> tuple[int, ...]:
        return tuple(sorted(model.layers))

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        if at.step < len(self.ids):
            early = at.early_logits()[0].log_softmax(-1)
            self.seen[at.step] = (early[:, self.ids[at.step]], early.argmax(-1))
        return logits
