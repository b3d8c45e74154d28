"""Batched generation whose results do not depend on how items are batched."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from vlm_steer.engine.steer import Steering
from vlm_steer.errors import ConfigError, SteerError
from vlm_steer.generation import encode, without_prompt

from .prefix import share_prompts
from .sampling import EndBias, FirstTokenMargin, SeededNoise

__all__ = ["Generator", "Output", "Settings", "item_seed"]

Words = tuple[Sequence[str], Sequence[str]]
Sharing = tuple[Steering, Sequence[str]]


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
        max_new_tokens: limit per answer, > 0; answers that reach it are flagged as truncated.
        num_beams: beams, >= 1.
        temperature: 0 for greedy or beam search; above, sampling with one beam.
        top_p: nucleus of sampling, in (0, 1].
        seed: seed of the run; sampling uses it together with the item's id.
        min_new_tokens: no answer ends before, >= 0.
        end_bias: added to the scores of the tokens that end an answer, which makes answers shorter
            (above 0) or longer.
        deterministic: answer one item at a time, by kernels that give the same bits every time
            where there are such; torch warns where there are none.
    """

    max_new_tokens: int = 512
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    min_new_tokens: int = 0
    end_bias: float = 0.0
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_new_tokens <= self.max_new_tokens or not math.isfinite(self.end_bias):
            raise ConfigError(
                f"min_new_tokens {self.min_new_tokens} must lie between 0 and --max-new-tokens "
                f"{self.max_new_tokens}, and end_bias {self.end_bias} must be finite"
            )
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens} and --num-beams {self.num_beams} must be "
                "at least 1"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"--temperature {self.temperature} must not be negative and --top-p {self.top_p} "
                "must lie in (0, 1]"
            )
        if self.temperature == 0 and self.top_p != 1:
            raise ConfigError("--top-p has no effect without sampling; give --temperature too")
        if self.temperature > 0 and self.num_beams > 1:
            raise ConfigError(
                "--temperature and --num-beams cannot be combined: sampled answers are seeded per "
                "item, which beam sampling does not allow"
            )

    def as_dict(self) -> dict[str, Any]:
        """Everything that the text depends on, where it has an effect."""
        plain = asdict(self)
        newer = ("min_new_tokens", "end_bias", "deterministic")
        unused = [name for name in newer if not plain[name]]
        for name in [*unused, *(["seed"] if self.temperature == 0 else [])]:
            del plain[name]
        return plain


@dataclass(frozen=True)
class Output:
    """One generated answer.

    Attributes:
        text: decoded, without special tokens.
        n_tokens: generated tokens, end of sequence included.
        truncated: whether it reached `max_new_tokens` without ending.
        margin: log p(first words) - log p(second words) at the first token; None where not asked
            for.
        layout: short hash of the prompt's token layout: its length and where its image tokens lie.
        batch: number of items generated together.
    """

    text: str
    n_tokens: int
    truncated: bool
    margin: float | None
    layout: str
    batch: int


@contextmanager
def _kernels(*, deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:
        # Read by the matrix products of CUDA when the first of them runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def item_seed(seed: int, item: str) -> int:
    """The seed of one item's sampling: a hash of the run's seed and the item's id."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item}".encode()).digest()[:8], "little") >> 1


class Generator:
    """A model, its processor and how to use them."""

    def __init__(
        self, model: Any, processor: Any, settings: Settings, words: Words | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.settings = settings
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._words = None if words is None else self._first_tokens(words)

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None,
        ids: Sequence[str],
        sharing: Sharing | None = None,
    ) -> list[Output]:
        """Generate for one batch.

        Args:
            prompts: whole prompts, from `vlm_steer.generation.render_prompt`.
            images: one image per prompt; None for prompts without images.
            ids: item ids, which seed the sampling.
            sharing: the steering and the images' digests, to compute equal beginnings once where
                that is possible; None computes every prompt whole.

        Returns:
            One output per prompt.
        """
        inputs = self._shared(prompts, images, sharing)
        if inputs is None:
            whole = encode(self.processor, prompts, images)
            inputs = whole.to(self.model.device, dtype=self.model.dtype)
        processors = LogitsProcessorList()
        margin = None
        if self._words is not None and self.settings.num_beams == 1:
            margin = FirstTokenMargin(*self._words)
            processors.append(margin)
        processors.extend(self._samplers(ids))
        with _kernels(deterministic=self.settings.deterministic):
            sequences = self.model.generate(
                **inputs,
                logits_processor=processors,
                # Sampling is the processors' work; what the model's defaults say must not act.
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=self.settings.num_beams,
                max_new_tokens=self.settings.max_new_tokens,
                min_new_tokens=self.settings.min_new_tokens or None,
            )
        margins = [None] * len(ids) if margin is None else margin.values(len(ids))
        return self._outputs(inputs, sequences, margins)

    def _shared(
        self, prompts: Sequence[str], images: Sequence[Image.Image] | None, sharing: Sharing | None
    ) -> Any:
        if sharing is None or images is None:
            return None
        steering, digests = sharing
        token_ids = steering.plan.model.image_token_ids
        shared = share_prompts(self.processor, prompts, images, digests, token_ids)
        return None if shared is None else shared.inputs(steering, self.settings.num_beams)

    def _samplers(self, ids: Sequence[str]) -> list[LogitsProcessor]:
        samplers: list[LogitsProcessor] = []
        if self.settings.end_bias:
            samplers.append(EndBias(sorted(self._end_tokens()), self.settings.end_bias))
        if self.settings.temperature == 0:
            return samplers
        samplers.append(TemperatureLogitsWarper(self.settings.temperature))
        if self.settings.top_p < 1:
            samplers.append(TopPLogitsWarper(self.settings.top_p))
        samplers.append(SeededNoise([item_seed(self.settings.seed, name) for name in ids]))
        return samplers

    def _outputs(
        self, inputs: Any, sequences: Tensor, margins: Sequence[float | None]
    ) -> list[Output]:
        ids = inputs["input_ids"]
        answers = without_prompt(sequences, ids).tolist()
        ends = self._end_tokens()
        outputs = []
        for row, answer in enumerate(answers):
            stop = next((i + 1 for i, token in enumerate(answer) if token in ends), None)
            length = len(answer) if stop is None else stop
            text = self._tokenizer.decode(answer[:length], skip_special_tokens=True)
            outputs.append(
                Output(
                    text=text.strip(),
                    n_tokens=length,
                    truncated=stop is None and length >= self.settings.max_new_tokens,
                    margin=margins[row],
                    layout=self._layout(ids[row], inputs.get("attention_mask"), row),
                    batch=len(answers),
                )
            )
        return outputs

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self._tokenizer.eos_token_id
        return set(ends) if isinstance(ends, (list, tuple)) else {ends}

    def _layout(self, ids: Tensor, mask: Tensor | None, row: int) -> str:
        kept = ids if mask is None else ids[mask[row].bool()]
        config = self.model.config
        image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        is_image = (kept == image).int().tolist() if image is not None else []
        edges = [
            i for i, (a, b) in enumerate(zip([0, *is_image], [*is_image, 0], strict=True)) if a != b
        ]
        return hashlib.sha256(f"{len(kept)}:{edges}".encode()).hexdigest()[:12]

    def _first_tokens(self, words: Words) -> tuple[Tensor, Tensor]:
        groups = []
        for group in words:
            spelled = [form for word in group for form in (word, f" {word}")]
            encoded = self._tokenizer(spelled, add_special_tokens=False)["input_ids"]
            groups.append({row[0] for row in encoded if row})
        common = groups[0] & groups[1]
        first, second = (torch.tensor(sorted(group - common)) for group in groups)
        if not len(first) or not len(second):
            raise SteerError(
                f"the tokenizer gives {words[0]} and {words[1]} the same first token, so no "
                "first-token margin can be measured"
            )
        return first, second
