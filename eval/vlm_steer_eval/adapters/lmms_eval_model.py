"""The class behind `lmms-eval --model vlm_steer`."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from lmms_eval.api.model import lmms
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types

from vlm_steer.errors import ConfigError

from .steered import Message, SteeredModel, file_hash

__all__ = ["SteeredLmms"]

_NO_EFFECT = frozenset(
    {"until", "image_aspect_ratio", "do_sample", "temperature", "top_p", "top_k"}
)
_KNOWN = _NO_EFFECT | {"max_new_tokens", "num_beams"}


class SteeredLmms(lmms):  # type: ignore[misc]  # lmms-eval ships no types
    """A steered model for lmms-eval.

    Args:
        pretrained: `tiny`, a folder or a hub id.
        steer: names joined by `+`, or a YAML file; nothing when omitted.
        steer_hash: of a YAML file, the hash that the error without it names. lmms-eval keeps
            answers under the arguments of the model, so the content of the file must be among them.
        batch_size: conversations at once, > 0.
        device: where the model lies, unless `device_map` says so.
        device_map: as in transformers.
        dtype: `auto`, `float32`, `float16` or `bfloat16`.
        revision: of a hub model.
        attn_implementation: of the attention.
        max_new_tokens: longest answer where a task says nothing.

    Raises:
        ConfigError: an option is wrong, or the file is not the one that the hash names.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny",
        steer: str | None = None,
        steer_hash: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        max_new_tokens: int = 1024,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise ConfigError(f"model_args of vlm_steer: unknown {', '.join(sorted(others))}")
        expected = file_hash(steer)
        if expected != (None if steer_hash is None else str(steer_hash)):
            raise ConfigError(
                f"model_args of vlm_steer: steer={steer} needs "
                f"{'no steer_hash' if expected is None else f'steer_hash={expected}'}, since "
                "lmms-eval keeps answers under its arguments and cannot see into a file"
            )
        self._steered = SteeredModel(
            pretrained,
            None if steer is None else str(steer),
            dtype=dtype,
            device_map=device_map or device,
            revision=revision,
            attn=attn_implementation,
        )
        self._batch_size = int(batch_size)
        self._max_new_tokens = max_new_tokens

    @property
    def batch_size(self) -> int:
        """Conversations at once."""
        return self._batch_size

    @property
    def model(self) -> Any:
        """The steered model."""
        return self._steered.model

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request, greedily or by beams.

        Raises:
            ConfigError: a task asks for sampling, or for an unknown option of generation.
        """
        answers: list[str] = []
        with tqdm(total=len(requests), desc="vlm_steer", disable=None) as bar:
            for batch, options in _batches(requests, self._batch_size):
                chats = [self._chat(request) for request in batch]
                texts = self._steered.answer(chats, **_generation(options, self._max_new_tokens))
                for request, text in zip(batch, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", request.args[:1], text)
                answers += texts
                bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: steering acts on what is generated."""
        raise NotImplementedError("vlm_steer answers generate_until tasks; choose one of those")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("vlm_steer answers generate_until tasks; choose one of those")

    def _chat(self, request: Any) -> list[Message]:
        # (context, doc_to_messages, options, doc, task, split); some versions leave the first out.
        to_messages, _, doc, task, split = request.args[-5:]
        return [_message(m) for m in to_messages(self.task_dict[task][split][doc])]


def _message(message: Mapping[str, Any]) -> Message:
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {"role": message["role"], "content": [_part(part) for part in content]}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image", "image": part["url"] if "url" in part else part["image"]}
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    raise ConfigError(f"vlm_steer reads text and images, and this task sends {part['type']}")


def _batches(requests: Sequence[Any], size: int) -> Any:
    """Neighbours with equal options of generation, in order."""
    rest = iter(requests)
    pending: list[Any] = []
    while pending or (pending := list(islice(rest, size))):
        options = pending[0].args[-4]
        n = next((i for i, r in enumerate(pending) if r.args[-4] != options), len(pending))
        yield pending[:n], options
        pending = pending[n:]


def _generation(options: Mapping[str, Any], longest: int) -> dict[str, Any]:
    unknown = sorted(set(options) - _KNOWN)
    if unknown:
        raise ConfigError(f"vlm_steer knows no option {', '.join(unknown)} of generation")
    if options.get("do_sample") or (options.get("temperature") or 0) > 0:
        raise ConfigError(
            "this task samples, whose answers would depend on the batch; pass "
            "--gen_kwargs temperature=0,do_sample=False"
        )
    until = options.get("until") or ()
    return {
        "max_new_tokens": int(options.get("max_new_tokens") or longest),
        "num_beams": int(options.get("num_beams") or 1),
        "stop": (until,) if isinstance(until, str) else tuple(until),
    }
