"""Passes over prompts and answers that traces are recorded in."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_steer.detection._observers import Received
from vlm_steer.engine.active import ACTIVE, Probe
from vlm_steer.engine.call import Call
from vlm_steer.engine.forward import Forward
from vlm_steer.engine.hooks import Columns, Selector
from vlm_steer.engine.inputs import without_image
from vlm_steer.engine.layout import Layout
from vlm_steer.engine.model import ModelInfo, one_stream
from vlm_steer.engine.plan import make_plan
from vlm_steer.engine.streams import Stream
from vlm_steer.errors import UnsupportedModelError

__all__ = ["Lens", "blind_logprob", "predicted", "received", "token_stats"]

_CHUNK = 128


def predicted(
    info: ModelInfo, arguments: Mapping[str, Any], width: int, seen_by: Probe | Forward
) -> Tensor:
    """``[batch, width, vocabulary]``: what the rows before the last ``width`` tokens predict."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(info.model.forward).parameters:
        options["logits_to_keep"] = width + 1
    token = ACTIVE.set(seen_by)
    try:
        logits: Tensor = info.model(**arguments, **options).logits
    finally:
        ACTIVE.reset(token)
    return logits[:, -width - 1 : -1]


def blind_logprob(
    info: ModelInfo, whole: Mapping[str, Any], layout: Layout, is_answer: Tensor
) -> Iterator[Tensor]:
    """``[tokens]`` log-probabilities of each answer without the image."""
    is_text = torch.cat([Columns(layout.prompt).is_text, is_answer.to(layout.prompt.device)], dim=1)
    blind = without_image(whole, is_text)
    width = is_answer.shape[1]
    logits = predicted(info, blind, width, Probe())
    chosen = token_stats(logits, blind["input_ids"][:, -width:])[0]
    # Answers now end at the right edge.
    return (row[width - n :] for row, n in zip(chosen, is_answer.sum(1).tolist(), strict=True))


def received(
    info: ModelInfo,
    whole: Mapping[str, Any],
    layout: Layout,
    is_answer: Tensor,
    scope: Literal["response", "sequence"],
    layers: Selector,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What ``Trace`` has as ``received``, ``own`` and ``n_rows``, per row."""
    if scope == "sequence" and info.has_two_way_prompts:
        raise UnsupportedModelError(
            f"prompts of {info.family} see each other in both directions, where the eigenvalues of "
            "a Laplacian are not on its diagonal. Use the scope response."
        )
    # The last token is left out: nothing follows it.
    is_kept = torch.cat([is_answer[:, 1:], torch.zeros_like(is_answer[:, :1])], dim=1)
    added = torch.where(is_kept, Columns.GENERATED, Columns.PADDING).to(layout.prompt)
    kinds = torch.cat([layout.prompt, added], dim=1)
    stream = Stream("positive", Layout.from_kinds(kinds))
    plan = make_plan((Received(layers=layers, scope_of_rows=scope),), info)
    forward = Forward(Call(plan, stream), (stream,), 0, kinds.shape[1])
    predicted(info, whole, 1, forward)
    tallies = torch.stack([tally for _, tally in sorted(stream.tallies.items())], dim=1).cpu()
    n_heads = tallies.shape[2] // 2
    found = []
    for row, kind in zip(tallies, kinds.cpu(), strict=True):
        chosen = kind == Columns.GENERATED
        if scope == "sequence":
            chosen = kind != Columns.PADDING
        row = row[..., chosen]
        found.append((row[:, :n_heads], row[:, n_heads:-1], row[:, -1]))
    return found


def token_stats(logits: Tensor, ids: Tensor) -> Tensor:
    """``[3, sequences, tokens]`` log-probability of the tokens, entropy and margin, float32."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, ids.to(logprobs.device)[..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    top = logprobs.topk(2, dim=-1).values
    return torch.stack([chosen, entropy, top[..., 0] - top[..., 1]])


class Lens:
    """Reads the image tokens of every layer as words, as a pass goes by (arXiv:2410.02762)."""

    def __init__(self, info: ModelInfo, is_image: Tensor, ids: Tensor):
        if info.has_cross_attention or not bool(is_image.any(1).all()):
            raise UnsupportedModelError(
                "the logit lens reads image tokens in the decoder's own sequence, which "
                f"{info.family} or this prompt does not have."
            )
        self.info, self.is_image, self.ids = info, is_image, ids
        self.readout = info.readout
        self._layers: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read every layer's output until the block ends."""
        with ExitStack() as hooks:
            for index, layer in self.info.layers.items():
                hooks.callback(layer.register_forward_hook(self._reader(index)).remove)
            yield

    def found(self) -> Tensor:
        """``[batch, tokens, layers]`` largest probability over the image tokens."""
        return torch.stack([self._layers[i].cpu() for i in sorted(self._layers)], dim=-1)

    def _reader(self, index: int) -> Callable[..., None]:
        def read(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            hidden = one_stream(output[0] if isinstance(output, tuple) else output)
            rows = zip(hidden, self.is_image, self.ids, strict=True)
            self._layers[index] = torch.stack([self._best(*row) for row in rows])

        return read

    def _best(self, hidden: Tensor, is_image: Tensor, ids: Tensor) -> Tensor:
        """``[tokens]`` of one row, image tokens in chunks: the vocabulary is wide."""
        states = hidden[: len(is_image)][is_image.to(hidden.device)]
        chunks = [
            self.readout(chunk).log_softmax(-1)[:, ids.to(hidden.device)].amax(0)
            for chunk in states.split(_CHUNK)  # type: ignore[no-untyped-call]  # untyped upstream
        ]
        return torch.stack(chunks).amax(0).exp()
