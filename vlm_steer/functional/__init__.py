"""The mathematics of the interventions: pure tensor functions without models or state."""

from vlm_steer.functional.boost import boost_scores
from vlm_steer.functional.contrast import contrast_logits, plausibility_mask
from vlm_steer.functional.heads import VisionAwareHeads, spin_gate, vision_aware_heads
from vlm_steer.functional.masks import concentric_rings, modality_mutual_mask
from vlm_steer.functional.probes import lookback_ratio
from vlm_steer.functional.sinks import (
    TransferScales,
    redistribute_sinks,
    sink_tokens,
    sink_transfer_scales,
    transfer_scales,
)

__all__ = [
    "TransferScales",
    "VisionAwareHeads",
    "boost_scores",
    "concentric_rings",
    "contrast_logits",
    "lookback_ratio",
    "modality_mutual_mask",
    "plausibility_mask",
    "redistribute_sinks",
    "sink_tokens",
    "sink_transfer_scales",
    "spin_gate",
    "transfer_scales",
    "vision_aware_heads",
]
