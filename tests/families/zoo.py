"""Tiny random vision-language models of real transformers families, for contract tests.

Every family is a shrunken configuration of the published architecture: four decoder layers, hidden
size 32, four query heads over two key heads where the family groups them, a two-layer vision tower.
It is built once per process, written with `save_pretrained` and always read back through
`AutoModelForImageTextToText`, so that tests see what users load. Pixels come from transformers' own
PIL image processors and prompts carry real image tokens in the layout of the family's processor.

    family = zoo.load("qwen2_vl")
    batch = family.batch([family.inputs(seed=0), family.inputs(n_text=9, seed=1)])
    family.model.generate(**batch, max_new_tokens=4)

Weights are redrawn at unit gain (see `_redraw`): transformers' default initialisation gives logits
so flat that a steering with no effect and one with a large effect look alike.
"""

from __future__ import annotations

import atexit
import functools
import math
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
)

Inputs = dict[str, Tensor]
Pictures = list[Image.Image]
Processor = Callable[..., Any]
Look = Callable[[Pictures], tuple[list[list[int]], Inputs]]

VOCAB = 160
PAD, BOS, EOS, IMAGE, START, END, BREAK, TILE, VIDEO = range(9)
FIRST_TEXT = 16
"""Ids below are special: never drawn as text, their output rows too small to be generated."""

LAYERS, HEADS, KEY_HEADS, HEAD_DIM, HIDDEN = 4, 4, 2, 8, 32
SIDE, PATCH = 32, 8
"""Pixels of one square vision tile and of one patch: 4 x 4 patches a tile."""
SQUARE = {"height": SIDE, "width": SIDE}
PICTURE = (32, 48)
"""Default picture (height, width): not square, so that swapped axes show."""

UNSUPPORTED: Mapping[tuple[str, int], str] = MappingProxyType(
    {
        ("blip-2", 0): "forward requires pixel_values",
        ("kosmos-2", 0): "forward requires pixel_values or image_embeds",
        ("instructblip", 0): "forward and generate require pixel_values",
        ("instructblip", 2): "the Q-Former pairs each image with one instruction row",
    }
)
"""(family, images in one row) that the architecture cannot take, with the reason."""

UNEQUAL_FORWARD: Mapping[str, str] = MappingProxyType(
    {
        "mistral_large4": "without position_ids a plain forward counts left padding as positions, "
        "and attention here scales with the absolute position; generate passes position_ids and "
        "is unaffected",
    }
)
"""Families whose plain forward is changed by left padding in unmodified transformers."""

UNEQUAL_DECODING: Mapping[str, str] = MappingProxyType(
    {
        "kosmos-2": "create_position_ids_from_input_ids adds the length of the cache, padding "
        "included, to the count of a generated token, so decoding skips as many positions as the "
        "row has padding"
    }
)
"""Families whose prompts batch equally, but whose generated tokens depend on left padding."""

NO_BEAMS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ["llama4", "granite_docling"],
        "generate repeats image tokens but not image features for the beams of a batch",
    )
)
"""Families in which unmodified transformers cannot search beams over a batch with images."""

UNEQUAL_BATCH: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ["hunyuan_vl"],
        "get_rope_index numbers the images of the whole batch through (its `image_index` is set "
        "to 0 before the loop over rows, not in it), so the image axis of a row's positions "
        "depends on the rows before it",
    )
)
"""Families in which a batch with images differs from its rows in unmodified transformers."""

UNEQUAL_MIXED: Mapping[str, str] = MappingProxyType(
    {
        "mllama": "positions before a row's image attend evenly to every image key of the batch, "
        "padding images included, because only the cross-attention layer's MLP is masked there",
    }
)
"""Families whose rows depend, in unmodified transformers, on how many images the other rows hold.

With equal image counts a left-padded batch equals the single rows in every family.
"""


class Unsupported(Exception):
    """The family cannot take this number of images in a row."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What distinguishes one family: its configuration and how its processor lays out a row.

    Attributes:
        config: the shrunken configuration.
        look: pictures of one row -> (prompt ids of each image block, tensors for the model).
        companions: prompt ids [S] and the row's tensors -> further tensors of that row.
        image_first: the image blocks precede `bos`, instead of following some text.
        self_attended: image tokens are positions of the decoder's own sequence.
        per_row: image tensors have a leading row axis; otherwise images of all rows are stacked.
        in_strip: the pixels of all images follow each other along the last axis.
    """

    config: PreTrainedConfig
    look: Look
    companions: Callable[[Tensor, Inputs], Inputs] = field(default=lambda ids, tensors: {})
    image_token_id: int = IMAGE
    image_first: bool = False
    self_attended: bool = True
    per_row: bool = False
    in_strip: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A loaded tiny model together with everything needed to prompt it."""

    name: str
    model: Any  # a PreTrainedModel; that type does not declare `generate`
    directory: Path
    recipe: Recipe

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the loaded model (not the one it was built from)."""
        config: PreTrainedConfig = self.model.config
        return config

    @property
    def image_token_id(self) -> int:
        """The id that marks image tokens in prompts (in Mllama, the place of an image)."""
        return self.recipe.image_token_id

    def inputs(
        self,
        n_text: int = 6,
        seed: int = 0,
        images: int = 1,
        *,
        size: tuple[int, int] = PICTURE,
    ) -> Inputs:
        """Builds one row: `[bos, 3 text ids, image blocks, n_text text ids]`.

        Families whose processor puts the image first give `[image blocks, bos, text ids]`.

        Args:
            n_text: number of text ids after the image blocks, >= 1.
            seed: draws text ids and pixels.
            images: number of images, 0 for text only.
            size: (height, width) of every picture in pixels before the processor resizes it.

        Raises:
            Unsupported: the family cannot take this number of images.
        """
        if reason := unsupported(self.name, images):
            raise Unsupported(f"{self.name} with {images} image(s) in a row: {reason}")
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        pictures = [_picture(rng, size) for _ in range(images)]
        blocks, tensors = self.recipe.look(pictures) if pictures else ([], {})
        lead = [BOS, *_text(rng, 3)]
        image = [token for block in blocks for token in block]
        head = [*image, *lead] if self.recipe.image_first else [*lead, *image]
        ids = torch.tensor([[*head, *_text(rng, n_text)]])
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tensors}
        row |= self.recipe.companions(ids[0], tensors)
        return {key: self._cast(value) for key, value in row.items()}

    def batch(self, rows: Sequence[Inputs]) -> Inputs:
        """Left-pads rows to one batch; image tensors are zero-padded at the end and stacked."""
        length = max(row["input_ids"].shape[1] for row in rows)
        out: Inputs = {}
        for key in dict.fromkeys(key for row in rows for key in row):
            blank = torch.zeros_like(next(row[key] for row in rows if key in row))
            if key in PER_TOKEN:
                values = [_left_pad(row.get(key, blank[:, :0]), length) for row in rows]
            elif self.recipe.per_row:
                values = [row.get(key, blank) for row in rows]
            else:
                values = [row[key] for row in rows if key in row]
            in_strip = self.recipe.in_strip and key == "pixel_values"
            out[key] = torch.cat(values, dim=-1) if in_strip else _stack(values)
        return out

    def expected_image_mask(self, inputs: Inputs) -> Tensor:
        """True where a prompt position is an image token [rows, S] bool; all False in Mllama."""
        is_image = inputs["input_ids"] == self.recipe.image_token_id
        return is_image if self.recipe.self_attended else torch.zeros_like(is_image)

    def cross_keys(self, inputs: Inputs) -> int:
        """Number of image keys a row has in cross-attention layers; 0 without such layers."""
        if self.recipe.self_attended or "pixel_values" not in inputs:
            return 0
        _, images, tiles, _, height, width = inputs["pixel_values"].shape
        return images * tiles * (height // PATCH * (width // PATCH) + 1)

    def _cast(self, value: Tensor) -> Tensor:
        value = value.to(self.model.device)
        return value.to(self.model.dtype) if value.is_floating_point() else value


def unsupported(name: str, images: int) -> str | None:
    """Why a family cannot take a row with this number of images; None if it can."""
    if images and name not in FAMILIES and name in extra_families(images=False):
        return "its pixel layout is not in the zoo"
    return UNSUPPORTED.get((name, images))


def extra_families(*, images: bool | None = None) -> tuple[str, ...]:
    """Names of the generically shrunken families; only those with (without) images if given."""
    from tests.families import extra

    chosen = {None: (*extra.IMAGES, *extra.TEXT_ONLY), True: extra.IMAGES, False: extra.TEXT_ONLY}
    return tuple(sorted(chosen[images]))


PER_TOKEN = frozenset(
    {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "mm_token_type_ids",
        "cross_attention_mask",
        "image_embeds_position_mask",
    }
)
"""Inputs whose axis 1 is the prompt position; 0 pads all of them (`PAD` included)."""


def load(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    attn_implementation: str | None = None,
) -> Family:
    """Loads a fresh copy of a family's model in eval mode, building it on first use.

    Args:
        name: one of `FAMILIES` or `extra_families()`.
        dtype: of the weights; floating inputs follow it.
        attn_implementation: as in `from_pretrained`; None is transformers' default (sdpa).
    """
    directory = build(name)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=dtype, attn_implementation=attn_implementation
    )
    return Family(name=name, model=model.eval(), directory=directory, recipe=_recipe(name))


@functools.cache
def build(name: str) -> Path:
    """Writes a family's model to disk once per process and returns its directory."""
    directory = _root() / name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto: Any = AutoModelForImageTextToText
        model = auto.from_config(_recipe(name).config)
    _redraw(model, seed=zlib.crc32(name.encode()))
    model.generation_config = GenerationConfig.from_dict(
        {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": None}
    )
    model.save_pretrained(directory)
    return directory


@functools.cache
def _root() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="vlm_steer_zoo_", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _recipe(name: str) -> Recipe:
    if name in BUILDERS:
        return BUILDERS[name]()
    from tests.families import extra

    return extra.recipe(name)


FINAL_NORM = r"((model|decoder)\.)*\w*norm\w*"


@torch.no_grad()
def _redraw(model: Any, seed: int) -> None:
    """Redraws all weights at unit gain, and makes special ids unlikely to be generated.

    Matrices are N(0, 1 / fan-in), so activations and attention scores keep unit scale at any width.
    Vectors (biases, norms) are jittered, which keeps both norm conventions (`w` and `1 + w`) near
    their neutral value. One-element parameters are gates that start closed in Mllama; opened, since
    otherwise no output depends on the image.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.numel() == 1:
            parameter.fill_(0.7)
        elif parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:
            experts = "experts" in name  # [experts, out, in], unlike convolutions [out, in, ...]
            fan_in = parameter.shape[-1] if experts else parameter[0].numel()
            parameter.copy_(noise / math.sqrt(fan_in))
    head = _output_embeddings(model)
    head.weight[:FIRST_TEXT] *= 0.01
    # Adding 2 triples the final norm's output under both norm conventions: logits of scale 3.
    modules = model.get_decoder().named_modules()
    norms = [module for name, module in modules if re.fullmatch(FINAL_NORM, name)]
    if norms:
        norms[-1].weight.add_(2.0)
    else:
        head.weight.mul_(3.0)


def _output_embeddings(model: Any) -> Any:
    """Of the model, or of the language model inside one that does not name its own."""
    inner = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    return next(head for get in inner if get is not None and (head := get()) is not None)


def _text(rng: np.random.Generator, count: int) -> list[int]:
    ids: list[int] = rng.integers(FIRST_TEXT, VOCAB, count).tolist()
    return ids


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def _left_pad(value: Tensor, length: int) -> Tensor:
    padding = value.new_full((value.shape[0], length - value.shape[1], *value.shape[2:]), PAD)
    return torch.cat([padding, value], dim=1)


def _stack(values: Sequence[Tensor]) -> Tensor:
    """Concatenates along axis 0 after zero-padding the end of every other axis."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    out = values[0].new_zeros((sum(value.shape[0] for value in values), *shape))
    start = 0
    for value in values:
        region = (
            slice(start, start + value.shape[0]),
            *(slice(0, size) for size in value.shape[1:]),
        )
        out[region] = value
        start += value.shape[0]
    return out


# Configurations shared by several families.


def _config(model_type: str, **fields: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**fields)


def _decoder(model_type: str, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        **fields,
    }


def _tower(model_type: str, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        **fields,
    }


def processor(class_name: str, **options: Any) -> Processor:
    """A PIL image processor (they need no torchvision) as a function to torch tensors."""
    pil: Any = getattr(transformers, class_name)(**options)
    return functools.partial(pil, return_tensors="pt")


def _blocks(lengths: Iterable[int], before: list[int], after: list[int]) -> list[list[int]]:
    return [[*before, *[IMAGE] * int(length), *after] for length in lengths]


def fixed(
    process: Processor,
    tokens: int,
    before: list[int] | None = None,
    after: list[int] | None = None,
) -> Look:
    """Layout of families in which every image becomes one tile of `tokens` image tokens."""

    def look(pictures: Pictures) -> tuple[list[list[int]], Inputs]:
        pixels = process(pictures)["pixel_values"]
        return _blocks([tokens] * len(pictures), before or [], after or []), {
            "pixel_values": pixels
        }

    return look


def _image_type_ids(key: str, ids: Tensor, tensors: Inputs) -> Inputs:
    return {key: (ids == IMAGE).long()[None]}


def _anyres_tokens(size: Tensor, pinpoints: list[list[int]], side: int = SIDE // PATCH) -> int:
    """Image tokens of LLaVA-NeXT: base tile, then the grid cropped to the aspect with newlines.

    Source: `unpad_image` and `pack_image_features` of transformers' modeling_llava_next.
    """
    height, width = (int(value) for value in size)
    best = transformers.image_processing_utils.select_best_resolution((height, width), pinpoints)
    rows, columns = (int(edge) * side // SIDE for edge in best)
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    return side * side + rows * (columns + 1)


# The families.


def _llava() -> Recipe:
    config = _config(
        "llava",
        text_config=_decoder("llama"),
        vision_config=_tower("clip_vision_model", projection_dim=HIDDEN),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    process = processor("CLIPImageProcessorPil", size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return Recipe(config=config, look=fixed(process, 16))


PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def anyres(side: int = SIDE // PATCH) -> Look:
    """Layout of LLaVA-NeXT: a base tile and a grid of tiles cropped to the picture's aspect.

    Args:
        side: tokens along each side of a tile.
    """
    process = processor(
        "LlavaNextImageProcessorPil",
        size={"shortest_edge": SIDE},
        crop_size=SQUARE,
        image_grid_pinpoints=PINPOINTS,
    )

    def look(pictures: Pictures) -> tuple[list[list[int]], Inputs]:
        out = process(pictures)
        lengths = [_anyres_tokens(size, PINPOINTS, side) for size in out["image_sizes"]]
        return _blocks(lengths, [], []), dict(out)

    return look


def _llava_next() -> Recipe:
    config = _config(
        "llava_next",
        text_config=_decoder("mistral", sliding_window=None),
        vision_config=_tower("clip_vision_model", projection_dim=HIDDEN),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return Recipe(config=config, look=anyres())


def _llava_onevision() -> Recipe:
    config = _config(
        "llava_onevision",
        text_config=_decoder("qwen2"),
        vision_config=_tower("siglip_vision_model", vision_use_head=False),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    process = processor(
        "LlavaOnevisionImageProcessorPil", size=SQUARE, image_grid_pinpoints=PINPOINTS
    )

    def look(pictures: Pictures) -> tuple[list[list[int]], Inputs]:
        out = dict(process([pictures]))
        # Several images in one row are not tiled: each is its base tile and one newline.
        lengths = [_anyres_tokens(size, PINPOINTS) for size in out["image_sizes"]]
        several = len(pictures) > 1
        return _blocks([17] * len(pictures) if several else lengths, [], []), out

    return Recipe(config=config, look=look)


def patched(before: list[int], after: list[int], *, temporal_patch_size: int = 2) -> Look:
    """Layout of Qwen-VL: flattened patches of any grid, merged two by two into tokens."""
    process = processor(
        "Qwen2VLImageProcessorPil",
        patch_size=PATCH,
        temporal_patch_size=temporal_patch_size,
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
    )

    def look(pictures: Pictures) -> tuple[list[list[int]], Inputs]:
        out = process(pictures)
        return _blocks(out["image_grid_thw"].prod(-1) // 4, before, after), dict(out)

    return look


def _qwen_vl(model_type: str, vision: dict[str, Any], **rope: Any) -> Recipe:
    config = _config(
        model_type,
        text_config=_decoder(
            f"{model_type}_text",
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, **rope},
        ),
        vision_config={"patch_size": PATCH, "depth": 2, "num_heads": 2, **vision},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    types = functools.partial(_image_type_ids, "mm_token_type_ids")
    return Recipe(config=config, look=patched([START], [END]), companions=types)


def _qwen2_vl() -> Recipe:
    vision = {"embed_dim": HIDDEN, "hidden_size": HIDDEN}
    return _qwen_vl("qwen2_vl", vision, mrope_section=[2, 1, 1])


def _qwen2_5_vl() -> Recipe:
    vision = {
        "hidden_size": HIDDEN,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    return _qwen_vl("qwen2_5_vl", vision, mrope_section=[2, 1, 1])


def _qwen3_vl() -> Recipe:
    vision = {
        "hidden_size": HIDDEN,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return _qwen_vl("qwen3_vl", vision, mrope_section=[2, 1, 1], mrope_interleaved=True)


def _tiled(tokens: int, **options: Any) -> Look:
    """Layout of InternVL and Aya: GotOcr2 tiling, all tiles of an image in one run of tokens."""
    process = processor(
        "GotOcr2ImageProcessorPil", size=SQUARE, crop_to_patches=True, max_patches=4, **options
    )

    def look(pictures: Pictures) -> tuple[list[list[int]], Inputs]:
        out = process(pictures)
        blocks = _blocks((tokens * int(tiles) for tiles in out["num_patches"]), [START], [END])
        return blocks, {"pixel_values": out["pixel_values"]}

    return look


def _internvl() -> Recipe:
    config = _config(
        "internvl",
        text_config=_decoder("qwen2"),
        vision_config=_tower("internvl_vision", image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return Recipe(config=config, look=_tiled(4))


def _aya_vision() -> Recipe:
    config = _config(
        "aya_vision",
        text_config=_decoder("cohere2", sliding_window=12, logit_scale=1.0),
        vision_config=_tower("siglip_vision_model", vision_use_head=False),
        image_token_index=IMAGE,
    )
    return Recipe(config=config, look=_tiled(4))


def _idefics(model_type: str, class_name: str) -> Recipe:
    config = _config(
        model_type,
        text_config=_decoder("llama"),
        vision_config=_tower(f"{model_type}_vision"),
        image_token_id=IMAGE,
        pad_token_id=PAD,
        scale_factor=2,
    )
    process = processor(
        class_name, size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )

    def look(pictures: Pictures) -> tuple[list[list[int]], Inputs]:
        out = process([pictures], return_row_col_info=True)
        grids = zip(out.pop("rows")[0], out.pop("cols")[0], strict=True)
        tile = [START, TILE, *[IMAGE] * 4]
        blocks = [
            [*([*tile * columns, BREAK] * rows), START, END, *[IMAGE] * 4, START]
            for rows, columns in grids
        ]
        return blocks, dict(out)

    return Recipe(config=config, look=look, per_row=True)


def _idefics3() -> Recipe:
    return _idefics("idefics3", "Idefics3ImageProcessorPil")


def _smolvlm() -> Recipe:
    return _idefics("smolvlm", "SmolVLMImageProcessorPil")


def _paligemma() -> Recipe:
    config = _config(
        "paligemma",
        text_config=_decoder("gemma"),
        vision_config=_tower("siglip_vision_model", vision_use_head=False, projection_dim=HIDDEN),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )

    def prefix(ids: Tensor, tensors: Inputs) -> Inputs:
        """All of an inference prompt is the bidirectional prefix, type 0."""
        return {"token_type_ids": torch.zeros_like(ids)[None]}

    process = processor("SiglipImageProcessorPil", size=SQUARE)
    return Recipe(config=config, look=fixed(process, 16), companions=prefix, image_first=True)


def _gemma3() -> Recipe:
    config = _config(
        "gemma3",
        text_config=_decoder(
            "gemma3_text",
            query_pre_attn_scalar=HEAD_DIM,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        vision_config=_tower("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    process = processor("Gemma3ImageProcessorPil", size=SQUARE)
    types = functools.partial(_image_type_ids, "token_type_ids")
    return Recipe(config=config, look=fixed(process, 4, [START], [END]), companions=types)


def _mistral3() -> Recipe:
    config = _config(
        "mistral3",
        text_config=_decoder("mistral", sliding_window=None),
        vision_config=_tower("pixtral", image_size=2 * SIDE, head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    process = processor(
        "PixtralImageProcessorPil",
        size={"longest_edge": 48},
        patch_size={"height": 2 * PATCH, "width": 2 * PATCH},
    )

    def look(pictures: Pictures) -> tuple[list[list[int]], Inputs]:
        out = process(pictures)
        grids = (out["image_sizes"] // (2 * PATCH)).tolist()
        blocks = [[*([*[IMAGE] * columns, BREAK] * rows)[:-1], END] for rows, columns in grids]
        return blocks, dict(out)

    return Recipe(config=config, look=look)


def _instructblip() -> Recipe:
    queries = 6
    config = _config(
        "instructblip",
        text_config=_decoder("llama"),
        vision_config=_tower("instructblip_vision_model"),
        qformer_config={
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        num_query_tokens=queries,
        image_token_index=IMAGE,
    )

    def instruction(ids: Tensor, tensors: Inputs) -> Inputs:
        text = ids[ids >= FIRST_TEXT][None]
        return {"qformer_input_ids": text, "qformer_attention_mask": torch.ones_like(text)}

    process = processor("BlipImageProcessorPil", size=SQUARE)
    look = fixed(process, queries)
    return Recipe(config=config, look=look, companions=instruction, image_first=True)


def _mllama() -> Recipe:
    config = _config(
        "mllama",
        text_config=_decoder("mllama_text_model", cross_attention_layers=[1, 3]),
        vision_config=_tower(
            "mllama_vision_model",
            image_size=16,
            num_global_layers=1,
            intermediate_layers_indices=[0],
            vision_output_dim=2 * HIDDEN,
        ),
        image_token_index=VOCAB,
    )
    process = processor(
        "MllamaImageProcessorPil", size={"height": 16, "width": 16}, max_image_tiles=4
    )

    def look(pictures: Pictures) -> tuple[list[list[int]], Inputs]:
        out = process([pictures])
        del out["num_tiles"]
        return [[VOCAB]] * len(pictures), dict(out)

    def seen(ids: Tensor, tensors: Inputs) -> Inputs:
        """From an image's token on, positions attend to that image's real tiles [1, S, N, T]."""
        if not tensors:
            return {}
        reached = (ids == VOCAB).cumsum(0)[:, None] > torch.arange(int((ids == VOCAB).sum()))
        tiles = tensors["aspect_ratio_mask"][0].bool()
        mask = reached[:, :, None] & tiles[None]
        return {"cross_attention_mask": mask.long()[None]}

    return Recipe(
        config=config,
        look=look,
        companions=seen,
        image_token_id=VOCAB,
        self_attended=False,
        per_row=True,
    )


BUILDERS: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "llava": _llava,
        "llava_next": _llava_next,
        "llava_onevision": _llava_onevision,
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "internvl": _internvl,
        "idefics3": _idefics3,
        "smolvlm": _smolvlm,
        "paligemma": _paligemma,
        "gemma3": _gemma3,
        "mistral3": _mistral3,
        "aya_vision": _aya_vision,
        "instructblip": _instructblip,
        "mllama": _mllama,
    }
)

FAMILIES: tuple[str, ...] = tuple(BUILDERS)
