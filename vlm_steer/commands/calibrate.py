"""What ``vlm-steer calibrate`` does: try variants of a method on questions with known answers."""

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types

from vlm_steer.engine.model import inspect_model
from vlm_steer.engine.steer import steer
from vlm_steer.errors import DataError
from vlm_steer.generation import encode, halving, render_prompt, without_prompt
from vlm_steer.images import open_image

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = ["Sample", "calibrate", "embedded_samples", "read_samples"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """A question about an image.

    Attributes:
        image: The image.
        question: What to ask.
        answer: How the right answer begins.
    """

    image: Image.Image
    question: str
    answer: str


def embedded_samples(limit: int | None) -> list[Sample]:
    """Questions about the embedded validation scenes, half of them about what is not there."""
    from vlm_steer.tiny import CATEGORIES, existence_question
    from vlm_steer.tiny.scenes import SCENES_PER_SPLIT, render, scene

    samples = []
    for index in range(min(limit or SCENES_PER_SPLIT, SCENES_PER_SPLIT)):
        drawn = scene("validation", index)
        there = [thing.category for thing in drawn.objects]
        absent = [name for name in CATEGORIES if name not in there]
        # Scenes alternate between two rules; pairs of them share the answer.
        is_yes = index // 2 % 2 == 0
        names = there if is_yes else absent
        name = names[index % len(names)]
        answer = "yes" if is_yes else "no"
        samples.append(Sample(render(drawn), existence_question(name), answer))
    return samples


def read_samples(path: Path, limit: int | None) -> list[Sample]:
    """Samples of a file with one JSON object per line; images are relative to the file.

    Raises:
        DataError: The file or an image cannot be read, or a line lacks a field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(path)}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text: {error}. Give JSON lines.") from error
    samples: list[Sample] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (limit is None or len(samples) < limit):
            samples.append(_sample(line, path, number))
    if not samples:
        raise DataError(f"{path} holds no samples.")
    return samples


def _sample(line: str, path: Path, number: int) -> Sample:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number} is not JSON: {error}.") from error
    names = ("image", "question", "answer")
    fields = [str(data.get(name) or "") for name in names] if isinstance(data, dict) else []
    if not fields or not all(field.strip() for field in fields):
        raise DataError(
            f"{path}:{number} must be an object with the texts image, question and answer."
        )
    image, question, answer = fields
    return Sample(open_image(path.parent / image), question, answer)


def calibrate(
    model: Any,
    processor: Any,
    method: "Method",
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, Any]:
    """Try every candidate of a method by itself.

    Returns:
        What the method chose, with the accuracies it chose by.

    Raises:
        ConfigError: The method has nothing to calibrate, or nothing helps.
    """
    info = inspect_model(model)
    candidates = method.candidates(info)
    accuracy = _Accuracy(model, processor, samples, max_new_tokens, batch_size)
    base = accuracy.of(None)
    progress = tqdm(candidates, unit="candidate", disable=None)
    accuracies = [accuracy.of(candidate) for candidate in progress]
    chosen = method.calibrated(candidates, [value - base for value in accuracies])
    return {
        **chosen,
        "samples": len(samples),
        "candidates": len(candidates),
        "accuracy_without": base,
        "accuracies": accuracies,
    }


@dataclass(eq=False)
class _Accuracy:
    """Share of the samples that a model answers right."""

    model: Any
    processor: Any
    samples: Sequence[Sample]
    max_new_tokens: int
    batch_size: int

    def of(self, method: "Method | None") -> float:
        """With one method, or without any."""
        with steer(self.model, method):
            right, self.batch_size = halving(self._right, self.samples, self.batch_size, _tell)
        return sum(right) / len(right)

    def _right(self, batch: Sequence[Sample]) -> list[bool]:
        prompts = [render_prompt(self.processor, sample.question) for sample in batch]
        inputs = encode(self.processor, prompts, [sample.image for sample in batch])
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False
            )
        new = without_prompt(output, inputs["input_ids"])
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [_begins(text, s.answer) for text, s in zip(texts, batch, strict=True)]


def _begins(text: str, answer: str) -> bool:
    """Whether a text begins with the words of an answer, in any case and punctuation."""
    words, expected = (re.findall(r"\w+", part.lower()) for part in (text, answer))
    return words[: len(expected)] == expected


def _tell(size: int) -> None:
    logger.warning("out of memory: going on with --batch-size %d", size)
