"""lmms-eval finds a steered model through the entry point `lmms_eval.models`.

    lmms-eval --model vlm_steer --model_args pretrained=llava-hf/llava-1.5-7b-hf,steer=var+vcd \
              --tasks pope

Nothing of lmms-eval is imported until it asks.
"""

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """What lmms-eval registers: the name `vlm_steer` and the class behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vlm_steer", chat_class_path="vlm_steer_eval.adapters.lmms_eval_model.SteeredLmms"
    )
