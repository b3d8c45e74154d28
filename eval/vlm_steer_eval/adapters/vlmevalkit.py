"""A steered model for VLMEvalKit: one line in its `vlmeval/config.py`.

    supported_VLM["llava_var_vcd"] = partial(SteeredVLM, model="llava-hf/llava-1.5-7b-hf",
                                             steer="var+vcd")

VLMEvalKit keeps predictions under that name, so let it tell the steering.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel

from .steered import SteeredModel

__all__ = ["SteeredVLM"]


class SteeredVLM(BaseModel):  # type: ignore[misc]  # VLMEvalKit ships no types
    """A steered model.

    Args:
        model: `tiny`, a folder or a hub id.
        steer: what to steer, in any form that `vlm_steer.steer` takes.
        max_new_tokens: longest answer, > 0.
        num_beams: beams, >= 1.
        options: further options of `vlm_steer.loading.load_model`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model: str = "tiny",
        steer: Any = None,
        max_new_tokens: int = 512,
        num_beams: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.steered = SteeredModel(model, steer, **options)
        self.max_new_tokens, self.num_beams = max_new_tokens, num_beams

    def generate_inner(
        self,
        message: Sequence[Mapping[str, str]],
        dataset: str | None = None,  # noqa: ARG002 (VLMEvalKit passes it)
    ) -> str:
        """Answer one message of texts and images, whatever the data set."""
        content = [
            {"type": "image", "image": part["value"]}
            if part["type"] == "image"
            else {"type": "text", "text": part["value"]}
            for part in message
        ]
        (answer,) = self.steered.answer(
            [[{"role": "user", "content": content}]],
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
        )
        return answer
