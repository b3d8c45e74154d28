"""Detectors that ask again: the same model, other models, or object detectors."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from vlm_steer.detection.base import Detector, Evidence, Unit, register_detector
from vlm_steer.detection.trace import Trace
from vlm_steer.errors import ConfigError, SteerError
from vlm_steer.generation import answer_ids, encode, render_prompt
from vlm_steer.loading import load_model
from vlm_steer.locating import load_zero_shot

__all__ = ["CrossCheck", "ObjectCheck", "SelfCheck"]

How: TypeAlias = Literal["samples", "question"]

_QUESTION = "Is there a {name} in the image?"
_YES, _NO = ("yes", "Yes"), ("no", "No")


@dataclass(frozen=True, kw_only=True)
class _Asking(Detector):
    """Asks vision-language models about the objects that a text names.

    Attributes:
        how: ``samples`` has each model answer the prompt again, several times; the risk is the
            share of answers that do not name the object. ``question`` asks whether it is there;
            the risk is the probability of no, among yes and no.
        n_samples: Answers per model for ``samples``, >= 1.
        temperature: Of these answers, > 0.
        max_new_tokens: Their limit.
        question: What ``question`` asks, with ``{name}``.
        seed: Of the sampling.
    """

    needs_evidence: ClassVar[bool] = True

    how: How = "samples"
    n_samples: int = 5
    temperature: float = 1.0
    max_new_tokens: int = 256
    question: str = _QUESTION
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_samples < 1 or self.temperature <= 0 or self.max_new_tokens < 1:
            raise ConfigError(
                f"{self.name}: n_samples {self.n_samples} and max_new_tokens "
                f"{self.max_new_tokens} must be at least 1 and temperature {self.temperature} "
                "above 0"
            )
        if "{name}" not in self.question:
            raise ConfigError(f"{self.name}: question {self.question!r} does not hold {{name}}")

    def features(
        self, trace: Trace, units: Sequence[Unit], evidence: Evidence | None = None
    ) -> Tensor:
        """``[units, 1]``."""
        if evidence is None:
            raise SteerError(f"{self.name} looks at the image. Pass evidence=Evidence(...).")
        words = [_words_for(trace, unit) for unit in units]
        asked = self.by_samples if self.how == "samples" else self.by_question
        risks = [asked(model, words, evidence) for model in self.models_of(evidence)]
        return torch.tensor(risks, dtype=torch.float64).reshape(len(risks), -1).mean(0)[:, None]

    def models_of(self, evidence: Evidence) -> Iterable[tuple[Any, Any]]:
        """Models to ask, each with its processor."""
        raise NotImplementedError

    def by_samples(
        self, model: tuple[Any, Any], words: Sequence[tuple[str, ...]], evidence: Evidence
    ) -> list[float]:
        """Share of sampled answers that name none of the words of each object."""
        texts = self.samples(*model, evidence)
        return [
            sum(not any(_names(text, word) for word in group) for text in texts) / len(texts)
            for group in words
        ]

    def samples(self, model: Any, processor: Any, evidence: Evidence) -> list[str]:
        """Answers to the same question, drawn at random; the global random state is kept."""
        prompt = evidence.prompt
        if evidence.model is not model:
            prompt = render_prompt(processor, evidence.question)
        inputs = encode(processor, [prompt], [evidence.image]).to(model.device, dtype=model.dtype)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(self.seed)
            output = model.generate(
                **inputs,
                do_sample=True,
                num_beams=1,
                temperature=self.temperature,
                top_p=1.0,
                top_k=0,
                num_return_sequences=self.n_samples,
                max_new_tokens=self.max_new_tokens,
            )
        tokenizer = getattr(processor, "tokenizer", processor)
        answers = answer_ids(model, output, inputs["input_ids"])
        return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    def by_question(
        self, model: tuple[Any, Any], words: Sequence[tuple[str, ...]], evidence: Evidence
    ) -> list[float]:
        """Probability of no, among yes and no, to a question about each object."""
        if not words:
            return []
        vlm, processor = model
        questions = [self.question.format(name=group[-1]) for group in words]
        prompts = [render_prompt(processor, text) for text in questions]
        inputs = encode(processor, prompts, [evidence.image] * len(prompts))
        with torch.inference_mode():
            output = vlm.generate(
                **inputs.to(vlm.device, dtype=vlm.dtype),
                do_sample=False,
                num_beams=1,
                max_new_tokens=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logprobs = output.logits[0].float().log_softmax(-1)
        tokenizer = getattr(processor, "tokenizer", processor)
        yes, no = (logprobs[:, _first_ids(tokenizer, group)].logsumexp(1) for group in (_YES, _NO))
        return torch.sigmoid(no - yes).tolist()


@register_detector("self_check")
@dataclass(frozen=True, kw_only=True)
class SelfCheck(_Asking):
    """What the model says when it is asked again (after SelfCheckGPT, 2303.08896).

    Attributes:
        how: ``samples`` or ``question``.
        n_samples: Answers for ``samples``.
        temperature: Of these answers.
        max_new_tokens: Their limit.
        question: What ``question`` asks, with ``{name}``.
        seed: Of the sampling.
    """

    paper: ClassVar[str] = "arXiv:2303.08896"

    def models_of(self, evidence: Evidence) -> Iterable[tuple[Any, Any]]:
        """The model itself."""
        if evidence.model is None:
            raise SteerError("self_check asks the model. Pass Evidence(..., model, processor).")
        return ((evidence.model, evidence.processor),)


@register_detector("cross_check")
@dataclass(frozen=True, kw_only=True)
class CrossCheck(_Asking):
    """What other models say about the same image (CrossCheckGPT, 2405.13684), on average.

    ``samples`` is the paper's explicit form, ``question`` its implicit one, asked per object
    instead of per sentence.

    Attributes:
        models: Folders or hub names of vision-language models, at least one.
        how: ``samples`` or ``question``.
        n_samples: Answers per model for ``samples``.
        temperature: Of these answers.
        max_new_tokens: Their limit.
        question: What ``question`` asks, with ``{name}``.
        seed: Of the sampling.
    """

    paper: ClassVar[str] = "arXiv:2405.13684"

    models: tuple[str, ...] = ()

    @cached_property
    def loaded(self) -> tuple[tuple[Any, Any], ...]:
        """The models with their processors, loaded when first needed."""
        return tuple(load_model(name) for name in self.models)

    def models_of(self, evidence: Evidence) -> Iterable[tuple[Any, Any]]:  # noqa: ARG002
        """The other models."""
        if not self.models:
            raise ConfigError(
                "cross_check needs other models: --set cross_check.models=[MODEL, ...]."
            )
        return self.loaded


@register_detector("object_check")
@dataclass(frozen=True, kw_only=True)
class ObjectCheck(Detector):
    """Whether zero-shot object detectors find what a text names (after SENTINEL, ICCV 2025).

    The risk is one minus the best score of any box for the object's name, averaged over detectors.
    SENTINEL lets two detectors decide, and leaves open what they disagree on: see ``agreement``.

    Attributes:
        models: Folders or hub names of zero-shot object detectors of transformers, such as
            ``google/owlv2-base-patch16-ensemble`` and ``IDEA-Research/grounding-dino-tiny``.
        template: What a detector is asked for, with ``{name}``.
        agreement: ``mean`` over detectors; ``least`` and ``most`` take the least and the most
            risky verdict, so that one, or every, detector has to find the object.
    """

    paper: ClassVar[str] = "arXiv:2507.12455"
    needs_evidence: ClassVar[bool] = True

    models: tuple[str, ...] = ()
    template: str = "{name}."
    agreement: Literal["mean", "least", "most"] = "mean"

    def __post_init__(self) -> None:
        if "{name}" not in self.template:
            raise ConfigError(f"object_check: template {self.template!r} does not hold {{name}}")

    @cached_property
    def loaded(self) -> tuple[tuple[Any, Any], ...]:
        """The detectors with their processors, loaded when first needed."""
        return tuple(load_zero_shot(name) for name in self.models)

    def features(
        self, trace: Trace, units: Sequence[Unit], evidence: Evidence | None = None
    ) -> Tensor:
        """``[units, 1]``."""
        if evidence is None:
            raise SteerError("object_check looks at the image. Pass evidence=Evidence(...).")
        if not self.models:
            raise ConfigError(
                "object_check needs object detectors: models=[MODEL, ...] in Python, or "
                "--set object_check.models=[MODEL, ...] of `vlm-steer detect`."
            )
        names = [_words_for(trace, unit)[-1] for unit in units]
        found = torch.tensor(
            [[self._score(*model, name, evidence) for name in names] for model in self.loaded],
            dtype=torch.float64,
        ).reshape(len(self.loaded), -1)
        risk = 1 - found
        if self.agreement == "mean":
            return risk.mean(0)[:, None]
        return (risk.amin(0) if self.agreement == "least" else risk.amax(0))[:, None]

    def _score(self, model: Any, processor: Any, name: str, evidence: Evidence) -> float:
        inputs = processor(
            images=evidence.image, text=[self.template.format(name=name)], return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            logits: Tensor = model(**inputs).logits
        return float(logits.float().sigmoid().amax())


def _words_for(trace: Trace, unit: Unit) -> tuple[str, ...]:
    """The words by which an object may be named: as written, and its name last."""
    written = trace.text[slice(*unit.span)].strip()
    return tuple(dict.fromkeys(word for word in (written, unit.name) if word)) or ("",)


def _names(text: str, word: str) -> bool:
    """Whether a text holds a word, singular or plural."""
    stem = re.escape(word.lower())
    return re.search(rf"\b{stem}(?:s|es)?\b", text.lower()) is not None


def _first_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """First tokens of words, with and without a space in front."""
    forms = [form for word in words for form in (word, f" {word}")]
    return sorted({row[0] for row in tokenizer(forms, add_special_tokens=False)["input_ids"]})
