"""Further image-text-to-text families, shrunken generically instead of one by one.

The default configuration of each family is taken as a nested dictionary; every size in it is
replaced by a tiny one according to its field name, and the few fields that no rule can guess are
overridden in `FIELDS`. `IMAGES` says which of a handful of pixel layouts a family takes; families
with a layout of their own run with text only. `NOT_BUILT` says why each of the others is left out.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig

from tests.families import zoo
from tests.families.zoo import Inputs, Look, Recipe

NAMES_OF_SIZE: tuple[tuple[int, str], ...] = (
    (zoo.VOCAB, "vocab_size text_vocab_size vocab_size_per_layer_input"),
    (
        zoo.HIDDEN,
        "hidden_size d_model embed_dim hidden_dim width out_hidden_size projection_dim "
        "text_hidden_size output_dim encoder_hidden_size embedding_dim moe_hidden_size "
        "projection_hidden_dim output_channels projector_input_dim projector_output_dim "
        "projector_hidden_size",
    ),
    (
        2 * zoo.HIDDEN,
        "intermediate_size intermediate_size_mlp ffn_dim mlp_dim d_ff "
        "encoder_ffn_dim decoder_ffn_dim alignment_intermediate_size vision_output_dim",
    ),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size share_expert_dim "
        "moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank",
    ),
    (
        zoo.HEAD_DIM,
        "head_dim swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "qk_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim "
        "hidden_size_per_layer_input query_pre_attn_scalar",
    ),
    (
        4,
        "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads "
        "linear_num_value_heads swa_num_attention_heads num_sliding_attention_heads",
    ),
    (
        2,
        "num_experts_per_tok moe_topk moe_k num_key_value_heads swa_num_key_value_heads "
        "linear_num_key_heads index_n_heads",
    ),
    (1, "n_group topk_group first_k_dense_replace"),
    (512, "max_position_embeddings"),
    (12, "sliding_window sliding_window_size"),
    (zoo.SIDE, "image_size"),
    (zoo.PATCH, "patch_size"),
)
SIZES = {key: size for size, keys in NAMES_OF_SIZE for key in keys.split()}
DEPTHS = ("num_hidden_layers", "num_layers", "depth", "layers", "encoder_layers", "decoder_layers")
HEADS = ("num_attention_heads", "num_heads", "attention_heads", "decoder_attention_heads")
PER_LAYER = ("layer_types", "mlp_layer_types", "moe_layers", "no_rope_layers", "per_layer_config")
DROPPED = (*PER_LAYER, "transformers_version", "dtype", "architectures")
"""Absent, per-layer lists are derived again from the new depth."""

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MROPE = {"rope_parameters": ROPE}
WHOLE_ROPE = {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
DEEPSTACK = {"vision_config": {"deepstack_visual_indexes": [0]}}
VISION_MARKS = {"vision_start_token_id": zoo.START, "vision_end_token_id": zoo.END}
HYBRID = {"text_config": {"layer_types": ["linear_attention", "full_attention"] * 2}}
# Image tokens are merged once inside the vision tower, behind its layer of that index.
MERGING = {**HYBRID, "insert_layer_id": 0}
FIELDS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "aria": {
            "projector_patch_to_query_dict": {"16": 4},
            "max_value_projector_patch_to_query_dict": 4,
        },
        "blip-2": {
            "num_query_tokens": 6,
            "image_token_index": zoo.IMAGE,
            "text_config": {"word_embed_proj_dim": zoo.HIDDEN},
        },
        "cohere_compass": {
            "text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
            **DEEPSTACK,
        },
        "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] * zoo.LAYERS}},
        "ernie4_5_vl_moe": {
            "text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
        },
        "cosmos3_edge": {"text_config": MROPE},
        "cosmos3_omni": DEEPSTACK,
        "glm46v": {"text_config": MROPE},
        "glm4v": {"text_config": MROPE},
        "glm4v_moe": {"text_config": {"head_dim": zoo.HEAD_DIM, **WHOLE_ROPE}},
        "glm5_next": {
            "text_config": {"num_key_value_heads": zoo.HEADS, "qk_rope_head_dim": 0},
        },
        "glm_ocr": {"text_config": WHOLE_ROPE},
        "glmga": {"text_config": WHOLE_ROPE},
        "hunyuan_vl": {
            "text_config": {
                "head_dim": zoo.HEAD_DIM,
                "rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]},
            }
        },
        "janus": {
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "latent_channels": 32,
                "num_embeddings": 64,
            },
            "vision_config": {"num_image_tokens": 16},
        },
        "gemma4": {
            "vision_config": {
                "hidden_size": zoo.HIDDEN,
                "intermediate_size": 2 * zoo.HIDDEN,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": zoo.HIDDEN // 2,
                "patch_size": zoo.PATCH,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            }
        },
        "gemma4_unified": {
            "vision_config": {
                "patch_size": zoo.PATCH,
                "pooling_kernel_size": 1,
                "mm_embed_dim": zoo.HIDDEN,
                "mm_posemb_size": 16,
                "output_proj_dims": zoo.HIDDEN,
            }
        },
        "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0]}},
        "kimi_k25": {
            "projection_hidden_size": zoo.HIDDEN,
            "text_config": {"num_key_value_heads": zoo.HEADS},
        },
        "llama4": {
            "vision_config": {"intermediate_size": 128, "vision_output_dim": zoo.HIDDEN},
        },
        "llava_next_video": {"image_grid_pinpoints": zoo.PINPOINTS},
        "mistral_large4": {
            "text_config": {
                "kv_source_layers": list(range(zoo.LAYERS)),
                "num_key_value_heads": zoo.HEADS,
            }
        },
        "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
        "paddleocr_vl": {"text_config": MROPE},
        "muse_glimmer": {"out_hidden_size": 4 * zoo.HIDDEN},
        "qwen3_vl_moe": DEEPSTACK,
        "minicpm_ocr": HYBRID,
        "minicpmv4_6": MERGING,
        "minicpmv4_7": MERGING,
        **dict.fromkeys(["qwen3_5", "qwen3_5_moe"], HYBRID),
        "chameleon": {
            "vocabulary_map": {
                "<image>": zoo.IMAGE,
                **{
                    f"IMGIMG{a}{b}Z": 100 + 8 * i + j
                    for i, a in enumerate("ABCD")
                    for j, b in enumerate("ABCDEFGH")
                },
            },
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "latent_channels": 32,
                "num_embeddings": 32,
                "embed_dim": 32,
                "resolution": zoo.SIDE,
                "num_res_blocks": 1,
            },
        },
        "dots3_note": {
            "text_config": {
                "num_key_value_heads": zoo.HEADS,
                "shared_experts_intermediate_size": 16,
                "index_topk": 64,
                "swa_q_lora_rank": 16,
                "swa_kv_lora_rank": 16,
                "swa_head_dim": 2 * zoo.HEAD_DIM,
                "swa_qk_nope_head_dim": zoo.HEAD_DIM,
                "swa_v_head_dim": zoo.HEAD_DIM,
                "swa_num_attention_heads": zoo.HEADS,
                "swa_num_key_value_heads": zoo.HEADS,
            },
            "vision_config": {
                "mlp_layer_types": ["dense"] * 2,
                "adapter_in_dim": zoo.HIDDEN,
                "adapter_out_dim": zoo.HIDDEN,
            },
            "audio_config": {
                "adapter_input_size": zoo.HIDDEN,
                "adapter_out_dim": zoo.HIDDEN,
                "downsample_hidden_size": 8,
                "feature_size": 16,
            },
        },
        "granite4_vision": {
            "vision_config": {"hidden_size": 64, "num_attention_heads": 2},
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 1]],
            "spatial_target_layers": [0, 1, 2, 3],
            "image_grid_pinpoints": zoo.PINPOINTS,
        },
        "kosmos-2": {"latent_query_num": 4},
        "muse_spark": {
            "out_hidden_size": 4 * zoo.HIDDEN,
            "audio_config": {
                "num_hidden_layers": 4,
                "hidden_sizes": [8] * 4,
                "depths": [1] * 4,
                "out_hidden_size": zoo.HIDDEN,
            },
        },
        "nemotron_h_omni": {"image_token_id": zoo.IMAGE, "vision_hidden_size": zoo.HIDDEN},
        "qwen2_5_omni_thinker": {
            **VISION_MARKS,
            "audio_config": {"encoder_attention_heads": 2},
            "text_config": MROPE,
            "vision_config": {"window_size": 32, "fullatt_block_indexes": [1]},
        },
        "qwen3_omni_moe_thinker": {
            **VISION_MARKS,
            "audio_config": {"encoder_attention_heads": 2, "downsample_hidden_size": 8},
            "text_config": MROPE,
            **DEEPSTACK,
        },
        "qwen4_exp": {
            "text_config": {
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": zoo.HEAD_DIM,
                "indexer_budget": 256,
                "indexer_compress_ratio": 4,
                "hc_count": 2,
                "hc_lowrank": 8,
                "layer_types": ["linear_attention", "indexed_attention"] * 2,
                **MROPE,
            }
        },
        "shieldgemma2": {"mm_tokens_per_image": 4},
        "step3p7": {"text_config": {"sliding_window": 12}},
        "vipllava": {"vision_feature_layers": [-2, -1]},
    }
)
"""Overrides that no field-name rule can guess, by family, merged into the shrunken defaults."""


def _tile(tokens: int, config: PreTrainedConfig) -> Look:
    process = zoo.processor("SiglipImageProcessorPil", size=zoo.SQUARE)
    return zoo.fixed(process, tokens)


def _sized_tile(tokens: int, config: PreTrainedConfig) -> Look:
    """A square tile that the model crops to its `image_sizes`, as Pixtral towers do."""
    plain = _tile(tokens, config)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        sizes = torch.full((len(pictures), 2), zoo.SIDE)
        return blocks, {**tensors, "image_sizes": sizes}

    return look


def _row_tile(tokens: int, config: PreTrainedConfig) -> Look:
    """Idefics-style: the tiles of one row under a leading row axis, with a pixel mask."""
    plain = _tile(tokens, config)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        pixels = tensors["pixel_values"][None]
        mask = torch.ones_like(pixels[:, :, 0], dtype=torch.long)
        return blocks, {"pixel_values": pixels, "pixel_attention_mask": mask}

    return look


def _grid(config: PreTrainedConfig, *, flat: bool = True, merges: bool = False) -> Look:
    """Qwen-style patches with `image_grid_thw`.

    Args:
        flat: patches are vectors; else small images [patches, channels, height, width].
        merges: the model is told its merge size per image.
    """
    vision = config.vision_config
    frames = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1)) or 1
    plain = zoo.patched([zoo.START], [zoo.END], temporal_patch_size=frames)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        if not flat:
            pixels = tensors["pixel_values"]
            tensors["pixel_values"] = pixels.view(-1, 3, zoo.PATCH, zoo.PATCH)
        if merges:
            tensors["image_merge_sizes"] = torch.full((len(pictures),), 2)
        return blocks, tensors

    return look


def _patches(pixels: Tensor, side: int = zoo.PATCH) -> Tensor:
    """Tiles [images, channels, height, width] -> patches [images, patches, values]."""
    return torch.nn.functional.unfold(pixels, side, stride=side).transpose(1, 2)


def _sides(count: int, side: int = zoo.SIDE // zoo.PATCH) -> Tensor:
    return torch.full((count, 2), side)


def _padded_patches(config: PreTrainedConfig) -> Look:
    """SigLIP 2 patches with their grid and a mask, merged two by two."""
    plain = _tile(4, config)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        patches = _patches(tensors["pixel_values"])
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        sizes = _sides(len(pictures))
        return blocks, {
            "pixel_values": patches,
            "spatial_shapes": sizes,
            "pixel_attention_mask": mask,
        }

    return look


def _placed_patches(tokens: int, config: PreTrainedConfig) -> Look:
    """Gemma 4: patches with values in [0, 1] and their (x, y) places."""
    plain = _tile(tokens, config)
    side = zoo.SIDE // zoo.PATCH

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)
        return blocks, {
            "pixel_values": _patches(tensors["pixel_values"] / 2 + 0.5),
            "image_position_ids": places.expand(len(pictures), -1, -1).clone(),
        }

    return look


def _row_marks(config: PreTrainedConfig) -> Look:
    """Hunyuan: merged patches with a mark after every row, one before and one after the image."""
    plain = _grid(config)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        _, tensors = plain(pictures)
        sizes = (tensors["image_grid_thw"][:, 1:] // 2).tolist()
        return [[zoo.START, *[zoo.IMAGE] * (h * (w + 1) + 2)] for h, w in sizes], tensors

    return look


def _merged_tiles(config: PreTrainedConfig) -> Look:
    """Inkling 2: squares of merged patches, channels last, with the grid of squares."""
    side = zoo.PATCH * config.vision_config.spatial_merge_size
    per_row = zoo.SIDE // side
    plain = _tile(per_row**2, config)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        squares = _patches(tensors["pixel_values"], side).flatten(0, 1)
        grid = torch.tensor([[1, per_row, per_row]]).repeat(len(pictures), 1)
        pixels = squares.view(-1, 3, side, side).permute(0, 2, 3, 1)
        return blocks, {"pixel_values": pixels.contiguous(), "image_grid_thw": grid}

    return look


def _flat_patches(config: PreTrainedConfig) -> Look:
    """Fuyu: patches are tokens."""
    plain = _tile(16, config)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        return blocks, {"image_patches": _patches(tensors["pixel_values"])}

    return look


def _strip(tokens: int, config: PreTrainedConfig) -> Look:
    """MiniCPM: patches of all images in one strip."""
    plain = _tile(tokens, config)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        patches = _patches(tensors["pixel_values"]).flatten(0, 1)
        strip = patches.view(-1, 3, zoo.PATCH, zoo.PATCH).permute(1, 2, 0, 3)
        sizes = _sides(len(pictures))
        return blocks, {"pixel_values": strip.flatten(2)[None], "target_sizes": sizes}

    return look


def _two_resolutions(config: PreTrainedConfig) -> Look:
    """DeepSeek-VL hybrid: every image twice."""
    plain = _tile(16, config)
    side = config.high_res_vision_config.image_size

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        pixels = tensors["pixel_values"]
        large = torch.nn.functional.interpolate(pixels, (side, side))
        return blocks, {"pixel_values": pixels, "high_res_pixel_values": large}

    return look


def _masked_tiles(config: PreTrainedConfig) -> Look:
    """Granite Docling: the tiles of a row under a leading axis, and which of them are real."""
    vision = config.vision_config
    plain = _tile((zoo.SIDE // zoo.PATCH // vision.scale_factor) ** 2, config)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        mask = torch.ones((1, len(pictures)), dtype=torch.bool)
        return blocks, {"pixel_values": tensors["pixel_values"][None], "pixel_attention_mask": mask}

    return look


def _listed_patches(config: PreTrainedConfig) -> Look:
    """Nemotron: the patches of all images in one list, with the sides of each grid."""
    plain = _tile(4, config)

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
        blocks, tensors = plain(pictures)
        patches = _patches(tensors["pixel_values"]).flatten(0, 1)
        return blocks, {"pixel_values": patches, "image_grid_hw": _sides(len(pictures))}

    return look


LookOf = Callable[[PreTrainedConfig], Look]
IMAGES: Mapping[str, LookOf] = MappingProxyType(
    {
        "aria": functools.partial(_tile, 4),
        "blip-2": functools.partial(_tile, 6),
        "cohere2_vision": functools.partial(_tile, 4),
        "cohere_compass": _grid,
        "cosmos3_edge": _grid,
        "cosmos3_omni": _grid,
        "chameleon": functools.partial(_tile, 16),
        "deepseek_vl": functools.partial(_tile, 16),
        "dots3_note": _grid,
        "ernie4_5_vl_moe": _grid,
        "exaone4_5": _grid,
        "glm46v": _grid,
        "glm4v": _grid,
        "glm4v_moe": _grid,
        "glm5_next": _grid,
        "glm_ocr": _grid,
        "glmga": _grid,
        "got_ocr2": functools.partial(_tile, 1),
        "hyperclovax_vision_v2": _grid,
        "idefics2": functools.partial(_row_tile, 64),
        "janus": functools.partial(_tile, 16),
        "lfm3_vl": _grid,
        "fuyu": _flat_patches,
        "gemma4": functools.partial(_placed_patches, 4),
        "gemma4_unified": functools.partial(_placed_patches, 16),
        "hunyuan_vl": _row_marks,
        "granite4_vision": lambda config: zoo.anyres(2),
        "granite_docling": _masked_tiles,
        "inkling2": _merged_tiles,
        "kimi_k25": functools.partial(_grid, flat=False),
        "kosmos-2": functools.partial(_tile, 4),
        "lfm2_vl": _padded_patches,
        "minicpm_ocr": functools.partial(_strip, 4),
        "minicpmv4_6": functools.partial(_strip, 1),
        "minicpmv4_7": functools.partial(_strip, 1),
        "mistral_large4": functools.partial(_sized_tile, 4),
        "deepseek_vl_hybrid": _two_resolutions,
        "lighton_ocr": functools.partial(_sized_tile, 4),
        "llama4": functools.partial(_tile, 4),
        "llava_next_video": lambda config: zoo.anyres(),
        "minimax_m3_vl": _grid,
        "muse_glimmer": _grid,
        "muse_spark": _grid,
        "nemotron_h_omni": _listed_patches,
        "ovis2": functools.partial(_tile, 16),
        "paddleocr_vl": functools.partial(_grid, flat=False),
        "pp_chart2table": functools.partial(_tile, 1),
        "qianfan_ocr": functools.partial(_tile, 4),
        "qwen2_5_omni_thinker": _grid,
        "qwen3_5": _grid,
        "qwen3_5_moe": _grid,
        "qwen3_omni_moe_thinker": _grid,
        "qwen3_vl_moe": _grid,
        "qwen4_exp": _grid,
        "shieldgemma2": functools.partial(_tile, 4),
        "step3p7": functools.partial(_tile, 1),
        "video_llama_3": functools.partial(_grid, merges=True),
        "video_llava": functools.partial(_tile, 16),
        "vipllava": functools.partial(_tile, 16),
    }
)
"""Pixel layout of each family that is prompted with images."""

TEXT_ONLY: tuple[str, ...] = (
    "deepseek_ocr2",
    "kosmos-2.5",
    "molmo2",
    "unlimited_ocr",
)
"""Families whose pixel layout is their own: built, and prompted with text only."""


NOT_BUILT: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(["fast_vlm", "gemma3n", "perception_lm"], "vision tower from timm"),
        **dict.fromkeys(
            [
                "florence2",
                "pix2struct",
                "pp_formulanet",
                "t5gemma2",
                "udop",
                "vision-encoder-decoder",
            ],
            "encoder-decoder: the prompt is not in the decoder's sequence",
        ),
        "blip": "its text decoder has an attention of its own",
        "diffusion_gemma": "generates by diffusion over blocks, not token by token",
        "emu3": "image tokens are codes of a learned codebook, between marks of the lines",
        "evolla": "reads proteins, not images",
        "git": "its text decoder has an attention of its own",
        "idefics": "names no image token",
        "inkling_mm_model": "a vision tower of billions of weights, whose sizes no field shrinks",
        "instructblipvideo": "names no image token",
        "mistral4": "a text-only language model",
        "pi0": "its outputs are robot actions",
    }
)
"""Image-text-to-text families of transformers that the zoo leaves out, with the reason."""


REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            [
                "florence2",
                "pix2struct",
                "pp_formulanet",
                "t5gemma2",
                "udop",
                "vision-encoder-decoder",
            ],
            "is an encoder-decoder",
        ),
        **dict.fromkeys(["blip", "git"], "no attention in"),
        **dict.fromkeys(["idefics", "instructblipvideo", "mistral4"], "names no image token"),
    }
)
"""Families that attaching refuses, with a word of the reason. Reviewed: add with care."""


def recipe(name: str) -> Recipe:
    """The recipe of an extra family."""
    config = _config(name)
    layout = IMAGES.get(name)
    mapping: Any = AutoModelForImageTextToText._model_mapping
    forward = inspect.signature(mapping[type(config)].forward)
    marks = ["mm_token_type_ids", "token_type_ids"]
    marks += ["image_embeds_position_mask"] if layout else []
    type_keys = [key for key in marks if key in forward.parameters]

    def types(ids: Tensor, tensors: Inputs) -> Inputs:
        return {key: (ids == zoo.IMAGE).long()[None] for key in type_keys}

    return Recipe(
        config=config,
        look=layout(config) if layout else _no_images,
        companions=types,
        per_row=name in ("idefics2", "granite_docling"),
        in_strip=getattr(layout, "func", None) is _strip,
    )


def _no_images(pictures: zoo.Pictures) -> tuple[list[list[int]], Inputs]:
    raise zoo.Unsupported("a text-only family was given a picture")


def _config(name: str) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[name]
    return config_class(**_merge(shrink(config_class().to_dict()), FIELDS.get(name, {})))


def shrink(fields: Mapping[str, Any], *, tower: bool = False) -> dict[str, Any]:
    """Replaces every size in a configuration dictionary by a tiny one, by field name."""
    return {key: _shrunk(key, value, tower) for key, value in fields.items() if key not in DROPPED}


def _shrunk(key: str, value: Any, tower: bool) -> Any:
    if isinstance(value, Mapping) and "model_type" in value:
        return shrink(value, tower=not re.search("text|decoder|language", key))
    if re.search("token_(id|index)$|image_patch_id", key):
        return _token(key, value)
    if value is None or isinstance(value, bool):
        return value
    if key in DEPTHS and isinstance(value, int):
        return 2 if tower else zoo.LAYERS
    if key in HEADS and isinstance(value, int):
        return 2 if tower else zoo.HEADS
    if key == "head_dim" and tower:
        return zoo.HIDDEN // 2
    if key in SIZES and isinstance(value, (list, tuple)):
        return [SIZES[key]] * len(value)
    return SIZES.get(key, value)


def _token(key: str, value: int | None) -> int | None:
    """Moves a special id into the zoo's range; only the image token's place is shared with it."""
    known = {"pad": zoo.PAD, "bos": zoo.BOS, "eos": None}
    role = key.split("_")[0]
    if role in known:
        return known[role]
    if re.match("image_(token|patch)", key):
        return zoo.IMAGE
    others = zoo.FIRST_TEXT - zoo.VIDEO
    return None if value is None else zoo.VIDEO + sum(key.encode()) % others


def _merge(fields: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides sub-configurations field by field, everything else whole."""
    merged = dict(fields)
    for key, value in overrides.items():
        inside = fields.get(key)
        if isinstance(inside, dict) and "model_type" in inside:
            value = _merge(inside, value)
        merged[key] = value
    return merged
