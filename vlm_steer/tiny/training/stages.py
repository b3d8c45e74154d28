"""The four stages: eye, language, projector, instructions.

A batch is a function of the seed and the step alone, so a run that was killed goes on exactly where
it stopped, and no random state has to be kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_steer.tiny.dice import Dice
from vlm_steer.tiny.language import (
    LONG_PROMPTS,
    SHORT_PROMPTS,
    Turn,
    conversations,
    long_caption,
    short_caption,
)
from vlm_steer.tiny.model import PATCH
from vlm_steer.tiny.scenes import IMAGE_SIZE, Scene, paint, scene, visible_masks
from vlm_steer.tiny.training.packing import Batch, Segment, attention_bias, pack
from vlm_steer.tiny.world import CATEGORIES

__all__ = [
    "ImageTextBatch",
    "Instructions",
    "Network",
    "Stage",
    "image_embeddings",
    "patch_labels",
    "run_language_model",
    "stages",
    "text_losses",
]

_SEED_STRIDE = 10_000_000  # scenes per seed and stage, more than any run draws
_BROAD_SHARE = 0.7
_NOISY_SHARE = 0.12
_VISIBLE_PIXELS = 10
_ROW_TOKENS = 224
_DECISION, _ELABORATION = 8.0, 0.5


class Network(nn.Module):
    """The model, and the two heads with which its eye is trained."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        width = model.model.vision_tower.config.hidden_size
        self.model = model
        self.heads = nn.ModuleDict(
            {"patch": nn.Linear(width, len(CATEGORIES)), "image": nn.Linear(width, len(CATEGORIES))}
        )


class Stage(ABC):
    """One stage of training.

    Attributes:
        name: what it is called in the log.
        steps: how many updates it makes.
        warmup: over how many of them the learning rate rises.
        matrix_lr: Muon's learning rate.
        other_lr: AdamW's.
        trained: prefixes of the names of the weights that change.
    """

    name: str
    warmup: int
    matrix_lr: float
    other_lr: float
    trained: tuple[str, ...]

    def __init__(self, processor: LlavaProcessor, *, seed: int, steps: int) -> None:
        self.tokenizer = processor.tokenizer
        self.seed = seed
        self.steps = steps

    @abstractmethod
    def batch(self, step: int) -> Any:
        """Make the batch of a step: a NamedTuple of tensors on the CPU."""

    @abstractmethod
    def losses(self, network: Network, batch: Any) -> dict[str, Tensor]:
        """Compute the loss to descend (``loss``) and the parts to log beside it."""

    def parameters(self, network: Network) -> dict[str, nn.Parameter]:
        """Return the weights that change, by name."""
        return {n: p for n, p in network.named_parameters() if n.startswith(self.trained)}

    def _dice(self, step: int) -> Dice:
        return Dice("vlm_steer.tiny", "training", self.name, self.seed, step)

    def _scenes(self, split: str, step: int, count: int) -> Iterator[Scene]:
        first = self.seed * _SEED_STRIDE + step * count
        return (scene(split, index) for index in range(first, first + count))

    def _segment(self, turn: Turn) -> Segment:
        question = self.tokenizer.encode(f"{turn.question} ASSISTANT:", add_special_tokens=False)
        answer = self.tokenizer.encode(f" {turn.answer}", add_special_tokens=False)
        answer.append(self.tokenizer.eos_token_id)
        weights = [1.0] * len(answer)
        if turn.decisive:
            weights = [_DECISION] + [_ELABORATION] * (len(answer) - 1)
        return Segment(question, answer, weights)


class VisionBatch(NamedTuple):
    """Pixels ``[images, 3, size, size]`` and which class each of the patches shows."""

    pixels: Tensor
    patches: Tensor


class Vision(Stage):
    """Teach the eye what each patch shows, mostly on scenes in which nothing predicts anything."""

    name = "vision"
    warmup, matrix_lr, other_lr = 60, 4e-3, 1e-3
    trained = ("model.model.vision_tower", "heads")
    images = 32

    def batch(self, step: int) -> VisionBatch:
        """See the base class."""
        dice = self._dice(step)
        split = ["broad" if dice.chance(_BROAD_SHARE) else "train" for _ in range(self.images)]
        first = self.seed * _SEED_STRIDE + step * self.images
        drawn = [scene(name, first + place) for place, name in enumerate(split)]
        return VisionBatch(
            pixels=_pixels(dice, drawn), patches=torch.stack([patch_labels(s) for s in drawn])
        )

    def losses(self, network: Network, batch: VisionBatch) -> dict[str, Tensor]:
        """See the base class."""
        output = network.model.model.vision_tower(batch.pixels, output_hidden_states=True)
        patch_scores = network.heads["patch"](output.hidden_states[-2][:, 1:])
        image_scores = network.heads["image"](output.pooler_output)
        entropy = nn.functional.binary_cross_entropy_with_logits
        emphasis = torch.tensor(3.0, device=batch.patches.device)
        patch = entropy(patch_scores.float(), batch.patches, pos_weight=emphasis)
        image = entropy(image_scores.float(), batch.patches.amax(dim=1))
        # Per patch rather than per class, so that the two terms are of one size.
        return {"loss": len(CATEGORIES) * patch + 0.3 * image, "patch": patch, "image": image}


class Language(Stage):
    """Teach the language model how captions go, without any image; here the prior forms."""

    name = "language"
    warmup, matrix_lr, other_lr = 30, 3e-3, 1e-3
    trained = ("model.model.language_model", "model.lm_head")
    rows = 14

    def batch(self, step: int) -> Batch:
        """See the base class."""
        dice = self._dice(step)
        prefix = self.tokenizer.encode("USER: ")
        rows: list[list[Segment]] = [[]]
        room = _ROW_TOKENS - len(prefix)
        index = self.seed * _SEED_STRIDE + step * 20 * self.rows
        while True:
            segment = self._segment(self._describe(dice, scene("train", index)))
            index += 1
            taken = len(segment.question) + len(segment.answer)
            if taken > room:
                if len(rows) == self.rows:
                    return pack(prefix, rows, self.tokenizer.pad_token_id)
                rows.append([])
                room = _ROW_TOKENS - len(prefix)
            rows[-1].append(segment)
            room -= taken

    def losses(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        """See the base class."""
        embedded = network.model.get_input_embeddings()(batch.input_ids)
        hidden = run_language_model(network, batch, embedded).last_hidden_state
        return text_losses(network, batch, hidden)

    @staticmethod
    def _describe(dice: Dice, seen: Scene) -> Turn:
        if dice.chance(0.85):
            return Turn(dice.pick(LONG_PROMPTS), long_caption(dice, seen), decisive=False)
        return Turn(dice.pick(SHORT_PROMPTS), short_caption(dice, seen), decisive=False)


class ImageTextBatch(NamedTuple):
    """Images and texts about them.

    Attributes:
        pixels: ``[images, 3, size, size]``.
        text: one packed row for each image.
        is_empty: ``[images, patches]`` bool: patches in which no object can be seen; without
            patches in stages that do not ask, since finding them costs a fifth of a batch.
    """

    pixels: Tensor
    text: Batch
    is_empty: Tensor


class Instructions(Stage):
    """Teach projector and language model to answer about images; the eye stays as it is."""

    name = "instructions"
    warmup, matrix_lr, other_lr = 40, 1.5e-3, 5e-4
    trained: tuple[str, ...] = (
        "model.model.multi_modal_projector",
        "model.model.language_model",
        "model.lm_head",
    )
    images = 12

    def batch(self, step: int) -> ImageTextBatch:
        """See the base class."""
        dice = self._dice(step)
        drawn = list(self._scenes("train", step, self.images))
        rows = [[self._segment(turn) for turn in conversations(dice, seen)] for seen in drawn]
        text = f"USER: {'<image>' * (IMAGE_SIZE // PATCH) ** 2}\n"
        prefix = self.tokenizer.encode(text)
        return ImageTextBatch(
            pixels=_pixels(dice, drawn),
            text=pack(prefix, rows, self.tokenizer.pad_token_id),
            is_empty=torch.stack([self._empty_patches(one) for one in drawn]),
        )

    def _empty_patches(self, seen: Scene) -> Tensor:  # noqa: ARG002 (for stages that do ask)
        return torch.zeros(0, dtype=torch.bool)

    def losses(self, network: Network, batch: ImageTextBatch) -> dict[str, Tensor]:
        """See the base class."""
        hidden = run_language_model(network, batch.text, image_embeddings(network, batch))
        return text_losses(network, batch.text, hidden.last_hidden_state)


class Projector(Instructions):
    """Align the projector first, so that its noise does not reach the language model."""

    name = "projector"
    warmup, matrix_lr, other_lr = 10, 5e-3, 5e-3
    trained = ("model.model.multi_modal_projector",)


def stages(
    processor: LlavaProcessor, *, seed: int, steps: tuple[int, int, int, int]
) -> list[Stage]:
    """Return the stages in their order, with their numbers of steps."""
    kinds: tuple[type[Stage], ...] = (Vision, Language, Projector, Instructions)
    return [kind(processor, seed=seed, steps=n) for kind, n in zip(kinds, steps, strict=True)]


def patch_labels(seen: Scene) -> Tensor:
    """Return which class can be seen in which patch, ``[patches, classes]`` float."""
    side = IMAGE_SIZE // PATCH
    masks = visible_masks(seen).reshape(-1, side, PATCH, side, PATCH)
    shown = masks.sum(axis=(2, 4)).reshape(-1, side * side) >= _VISIBLE_PIXELS
    labels = torch.zeros(side * side, len(CATEGORIES))
    for thing, patches in zip(seen.objects, shown, strict=True):
        labels[torch.from_numpy(patches), CATEGORIES.index(thing.category)] = 1
    return labels


def _pixels(dice: Dice, drawn: list[Scene]) -> Tensor:
    """Paint scenes as the processor would, and drown a few of them in noise.

    Without noisy images in training, the noised branch of a contrastive method would see something
    wholly foreign.
    """
    painted = np.stack([paint(one) for one in drawn])
    pixels = torch.from_numpy(painted).permute(0, 3, 1, 2).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(dice.integer(0, 2**48))
    for place in range(len(drawn)):
        if dice.chance(_NOISY_SHARE):
            kept = dice.between(0.02, 0.95)
            noise = torch.randn(pixels.shape[1:], generator=generator)
            pixels[place] = kept**0.5 * pixels[place] + (1 - kept) ** 0.5 * noise
    return pixels


def image_embeddings(network: Network, batch: ImageTextBatch) -> Tensor:
    """``[rows, length, width]`` embeddings of packed rows, those of the images among them."""
    model = network.model
    features = model.get_image_features(pixel_values=batch.pixels).pooler_output
    embedded = model.get_input_embeddings()(batch.text.input_ids)
    is_image = (batch.text.input_ids == model.config.image_token_id)[:, :, None]
    filled: Tensor = embedded.masked_scatter(is_image, torch.cat(list(features)).to(embedded.dtype))
    return filled


def run_language_model(network: Network, batch: Batch, embedded: Tensor, **options: Any) -> Any:
    """What the language model makes of packed rows."""
    return network.model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=attention_bias(batch.segments),
        position_ids=batch.positions,
        use_cache=False,
        **options,
    )


def text_losses(network: Network, batch: Batch, hidden: Tensor) -> dict[str, Tensor]:
    """The loss of the answers, and its parts."""
    learnt = batch.weights > 0
    scores = network.model.lm_head(hidden[learnt]).float()
    losses = nn.functional.cross_entropy(scores, batch.targets[learnt], reduction="none")
    weights = batch.weights[learnt]
    parts = {"loss": (losses * weights).sum() / weights.sum()}
    for name, level in (("text", 1.0), ("decision", _DECISION)):
        if (weights == level).any():
            parts[name] = losses[weights == level].mean()
    return parts
