"""The mathematics of the interventions: pure tensor functions without models or state."""

from vlm_steer.functional.boost import (
    boost_scores,
    gift_fuse,
    gift_saliency,
    scale_scores,
)
from vlm_steer.functional.contrast import (
    EntropyContrast,
    add_change,
    contrast_logits,
    decore_logits,
    guidance_logits,
    m3id_logits,
    plausibility_mask,
)
from vlm_steer.functional.controls import (
    move_to_columns,
    shuffle_columns,
)
from vlm_steer.functional.fast import (
    GroupedAttention,
    grouped_attention,
    grouped_values,
    merge_groups,
    row_scores,
    weighted_values,
)
from vlm_steer.functional.heads import (
    VisionAwareHeads,
    image_heads,
    spin_gate,
    text_visual_entropy,
    vision_aware_heads,
    visual_sensitivity,
)
from vlm_steer.functional.layers import (
    deco_candidates,
    deco_logits,
    dola_logits,
    early_logit_mix,
)
from vlm_steer.functional.masks import (
    concentric_mask,
    concentric_positions,
    concentric_rings,
    knockout_mask,
    modality_mutual_mask,
    see_periphery,
)
from vlm_steer.functional.noise import (
    diffusion_noise,
)
from vlm_steer.functional.probes import (
    column_entropy,
    laplacian_eigenvalues,
    lookback_ratio,
    summed_visual_attention_ratio,
)
from vlm_steer.functional.retrace import (
    memvr_retrace,
    retrace_uncertainty,
)
from vlm_steer.functional.search import (
    OverTrustPenalty,
    opera_penalty,
    vdgd_logits,
)
from vlm_steer.functional.segments import (
    aligned_positions,
    image_segments,
    see_other_segments,
    segment_importance,
    segment_lengths,
    segment_shifts,
)
from vlm_steer.functional.sinks import (
    SinkLifetimes,
    TransferScales,
    act_calibrate,
    attention_sinks,
    received_attention,
    redistribute_sinks,
    secondary_sinks,
    sink_lifetimes,
    sink_tokens,
    sink_transfer_scales,
    spread_sinks,
    transfer_scales,
)
from vlm_steer.functional.tokens import (
    InformedTokens,
    blind_tokens,
    focus_scores,
    least_attended_tokens,
    low_focus,
    paint_tokens,
)
from vlm_steer.functional.vectors import (
    steering_direction,
    vsv_shift,
    vti_shift,
)

__all__ = [
    "EntropyContrast",
    "GroupedAttention",
    "InformedTokens",
    "OverTrustPenalty",
    "SinkLifetimes",
    "TransferScales",
    "VisionAwareHeads",
    "act_calibrate",
    "add_change",
    "aligned_positions",
    "attention_sinks",
    "blind_tokens",
    "boost_scores",
    "column_entropy",
    "concentric_mask",
    "concentric_positions",
    "concentric_rings",
    "contrast_logits",
    "deco_candidates",
    "deco_logits",
    "decore_logits",
    "diffusion_noise",
    "dola_logits",
    "early_logit_mix",
    "focus_scores",
    "gift_fuse",
    "gift_saliency",
    "grouped_attention",
    "grouped_values",
    "guidance_logits",
    "image_heads",
    "image_segments",
    "knockout_mask",
    "laplacian_eigenvalues",
    "least_attended_tokens",
    "lookback_ratio",
    "low_focus",
    "m3id_logits",
    "memvr_retrace",
    "merge_groups",
    "modality_mutual_mask",
    "move_to_columns",
    "opera_penalty",
    "paint_tokens",
    "plausibility_mask",
    "received_attention",
    "redistribute_sinks",
    "retrace_uncertainty",
    "row_scores",
    "scale_scores",
    "secondary_sinks",
    "see_other_segments",
    "see_periphery",
    "segment_importance",
    "segment_lengths",
    "segment_shifts",
    "shuffle_columns",
    "sink_lifetimes",
    "sink_tokens",
    "sink_transfer_scales",
    "spin_gate",
    "spread_sinks",
    "steering_direction",
    "summed_visual_attention_ratio",
    "text_visual_entropy",
    "transfer_scales",
    "vdgd_logits",
    "vision_aware_heads",
    "visual_sensitivity",
    "vsv_shift",
    "vti_shift",
    "weighted_values",
]
