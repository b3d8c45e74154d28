"""A steered model for VLMEvalKit: one line in its `vlmeval/config.py`.

    supported_VLM["llava_var_vcd"] = partial(SteeredVLM, model="llava-hf/llava-1.5-7b-hf",
                                             steer="var+vcd")

VLMEvalKit keeps predictions under that name, so let it tell the steering.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel

from vlm_steer.errors import ConfigError, DataError

from .steered import Message, SteeredModel

__all__ = ["SteeredVLM"]


class SteeredVLM(BaseModel):  # type: ignore[misc]  # VLMEvalKit ships no types
    """A steered model.

    Args:
        model: `tiny`, a folder or a hub id.
        steer: what to steer, in any form that `vlm_steer.steer` takes.
        max_new_tokens: longest answer, > 0.
        num_beams: beams, >= 1.
        use_vllm: what VLMEvalKit passes for names that hold "Qwen2-VL" and the like; must be False,
            since steering acts inside transformers.
        options: further options of `vlm_steer.loading.load_model`.

    Raises:
        ConfigError: vLLM is asked for, or the specification is wrong.
        UnsupportedModelError: there is no such model, or it cannot be steered as asked.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        model: str = "tiny",
        steer: Any = None,
        max_new_tokens: int = 512,
        num_beams: int = 1,
        *,
        use_vllm: bool = False,
        **options: Any,
    ) -> None:
        if use_vllm:
            raise ConfigError("use_vllm: a steered model runs in transformers; leave vLLM out")
        super().__init__()
        self.steered = SteeredModel(model, steer, **options)
        self.max_new_tokens, self.num_beams = max_new_tokens, num_beams

    def generate_inner(
        self,
        message: Sequence[Mapping[str, str]],
        dataset: str | None = None,  # noqa: ARG002 (VLMEvalKit passes it)
    ) -> str:
        """Answer one message of texts and images, whatever the data set."""
        return self._answer([{"role": "user", "content": _content(message)}])

    def chat_inner(
        self,
        message: Sequence[Mapping[str, Any]],
        dataset: str | None = None,  # noqa: ARG002 (VLMEvalKit passes it)
    ) -> str:
        """Answer the last turn of a conversation."""
        turns = [{"role": turn["role"], "content": _content(turn["content"])} for turn in message]
        return self._answer(turns)

    def _answer(self, conversation: Sequence[Message]) -> str:
        (answer,) = self.steered.answer(
            [conversation], max_new_tokens=self.max_new_tokens, num_beams=self.num_beams
        )
        return answer


def _content(message: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """A message of VLMEvalKit as chat templates take it."""
    foreign = sorted({part["type"] for part in message} - {"text", "image"})
    if foreign:
        raise DataError(f"a steered model reads texts and images, not {', '.join(foreign)}")
    return [{"type": part["type"], part["type"]: part["value"]} for part in message]
