"""Texts of a model, what detectors see in them, and which parts are right: batch by batch on disk.

What a batch gave is kept in a file named by everything it depends on, so an interrupted run goes on
where it stopped.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types

from vlm_steer.config import dump, resolve
from vlm_steer.detection import (
    Detector,
    Evidence,
    Trace,
    Unit,
    trace_answers,
    trace_generation,
)
from vlm_steer.errors import ConfigError, DataError
from vlm_steer.generation import answer_ids, encode, halving, render_prompt
from vlm_steer_eval.benchmarks.tasks import Item
from vlm_steer_eval.files import reporting_write_errors
from vlm_steer_eval.running.fingerprint import model_fingerprint, versions
from vlm_steer_eval.running.genlog import content_key
from vlm_steer_eval.running.images import ImageError

from .labels import Labelled
from .stats import Labels

__all__ = ["Collected", "Settings", "collect", "split_images"]

PARTS = ("train", "calibration", "test")
_SHARES = (0.6, 0.2, 0.2)
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Settings:
    """How texts are made.

    Attributes:
        max_new_tokens: Limit per text.
        methods: What to steer with while generating, as `vlm_steer.steer` takes it.
        batch_size: Texts at once.
    """

    max_new_tokens: int = 512
    methods: str = "none"
    batch_size: int = 8


@dataclass(frozen=True, eq=False)
class Collected:
    """Units of many texts, with what every detector sees of them.

    Attributes:
        units: the units.
        image: image of each unit.
        item: id of each unit's text.
        features: detector -> `[units, d]`.
        texts: item id -> text.
        failures: items left out because of their image, with the reason.
    """

    units: Sequence[Unit]
    image: Sequence[str]
    item: Sequence[str]
    features: Mapping[str, Tensor]
    texts: Mapping[str, str]
    failures: Sequence[Mapping[str, str]] = ()

    @property
    def labels(self) -> Tensor:
        """`[units]`, 1, 0 or -1."""
        return torch.tensor([unit.label for unit in self.units], dtype=torch.long)

    @property
    def words(self) -> Tensor:
        """`[units]` float64, words before each unit in its text."""
        return torch.tensor([unit.word for unit in self.units], dtype=torch.float64)

    def where(self, is_kept: Tensor) -> "Collected":
        """Some of the units."""
        kept = is_kept.nonzero().flatten().tolist()
        return Collected(
            [self.units[i] for i in kept],
            [self.image[i] for i in kept],
            [self.item[i] for i in kept],
            {name: values[kept] for name, values in self.features.items()},
            self.texts,
            self.failures,
        )

    @property
    def labelled(self) -> "Collected":
        """The units that have a label."""
        return self.where(self.labels >= 0)

    def as_labels(self) -> Labels:
        """What statistics need to know; every unit has to have a label."""
        return Labels(
            self.labels.numpy() == 1,
            self.image,
            self.item,
            self.words.numpy(),
            np.array([unit.occurrence for unit in self.units], dtype=np.float64),
        )


def split_images(images: Sequence[str], seed: int = 0) -> list[str]:
    """The part of each image: train, calibration or test, about 60, 20 and 20 percent.

    A seeded hash of the name decides, so an image is in the same part whatever others there are.
    """

    def part(image: str) -> str:
        digest = hashlib.sha256(f"{seed}/split/{image}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return PARTS[0] if place < _SHARES[0] else PARTS[1 if place < sum(_SHARES[:2]) else 2]

    return [part(image) for image in images]


def collect(
    source: Labelled,
    model: Any,
    processor: Any,
    detectors: Mapping[str, Detector],
    settings: Settings,
    folder: Path,
    *,
    model_name: str,
) -> Collected:
    """Make or read the texts of a source, trace them, and keep what detectors see.

    Args:
        source: items and labels.
        model: the model.
        processor: its processor.
        detectors: by name.
        settings: how texts are made.
        folder: where batches are kept.
        model_name: what the user calls the model.

    Raises:
        ConfigError: a detector cannot be used with steering.
        DataError: no item could be used, no text holds a unit, a file of a batch is damaged, or
            the folder cannot be written.
    """
    if not source.items:
        raise DataError("there is nothing to judge: the data hold no items")
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    methods = resolve(settings.methods)
    needs = sorted({need for detector in detectors.values() for need in detector.needs})
    if methods and set(needs) - {"maps"}:
        raise ConfigError(
            f"--method {settings.methods}: {', '.join(needs)} is read off a second pass, which is "
            "not steered. Leave out the detectors that need it, or the method."
        )
    base = {
        "model": model_fingerprint(model, model_name),
        "versions": versions(),
        "methods": dump(methods),
        "max_new_tokens": settings.max_new_tokens,
        "labels": source.name,
        "detectors": {name: [d.name, d.options()] for name, d in detectors.items()},
    }
    failures: dict[str, str] = {}
    parts = []

    def work(items: Sequence[Item]) -> list[int]:
        usable = []
        for item in items:
            try:
                item.image.load()  # a file that is there may still be no image
                usable.append((item, item.image.digest()))
            except ImageError as error:
                failures[item.id] = str(error)
        if usable:
            asked = [[item.id, digest, item.prompt, _plain(item.gold)] for item, digest in usable]
            path = folder / f"{content_key({**base, 'asked': asked})[:24]}.safetensors"
            if not path.is_file():
                batch = [item for item, _ in usable]
                _write(
                    path,
                    _judge(source, batch, model, processor, detectors, methods, needs, settings),
                )
            parts.append(_read(path))
        return [len(items)] * len(items)

    with tqdm(total=len(source.items), desc="texts", disable=None, leave=False) as bar:
        for start in range(0, len(source.items), settings.batch_size):
            batch = source.items[start : start + settings.batch_size]
            halving(work, batch, len(batch), lambda size: bar.set_postfix(batch=size))
            bar.update(len(batch))
    if not parts:
        why = next(iter(failures.values()))
        raise DataError(f"none of {len(source.items)} images can be read: {why}")
    if not any(part.units for part in parts):
        text = next(text for part in parts for text in part.texts.values())
        raise DataError(
            f"there is nothing to judge: none of {len(source.items)} texts holds a part that can "
            f"be labelled, see the first: {text.strip()[:_SHOWN_CHARACTERS]!r}"
        )
    return _joined(parts, [{"item": item, "error": why} for item, why in failures.items()])


def _plain(gold: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: sorted(value) if isinstance(value, set | frozenset) else value
        for key, value in gold.items()
    }


def _judge(
    source: Labelled,
    items: Sequence[Item],
    model: Any,
    processor: Any,
    detectors: Mapping[str, Detector],
    methods: Any,
    needs: Sequence[Any],
    settings: Settings,
) -> Collected:
    """Units and features of one batch."""
    prompts = [render_prompt(processor, item.prompt) for item in items]
    images = [item.image.load() for item in items]
    inputs = encode(processor, prompts, images).to(model.device, dtype=model.dtype)
    traces = _traces(items, model, processor, inputs, methods, needs, settings)
    units, owners, texts = [], [], {}
    features: dict[str, list[Tensor]] = {name: [] for name in detectors}
    for item, trace, prompt, image in zip(items, traces, prompts, images, strict=True):
        found = source.units(trace, item)
        texts[item.id] = trace.text
        if not found:
            continue
        units += found
        owners += [item] * len(found)
        evidence = Evidence(image, prompt, item.prompt, model, processor)
        for name, detector in detectors.items():
            features[name].append(detector.features(trace, found, evidence))
    return Collected(
        units,
        [item.cluster for item in owners],
        [item.id for item in owners],
        {name: torch.cat(values) for name, values in features.items() if values},
        texts,
    )


def _traces(
    items: Sequence[Item],
    model: Any,
    processor: Any,
    inputs: Any,
    methods: Any,
    needs: Sequence[Any],
    settings: Settings,
) -> list[Trace]:
    given = [text for item in items if (text := item.gold.get("text"))]
    options: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "num_beams": 1,
        "max_new_tokens": settings.max_new_tokens,
    }
    if len(given) == len(items):
        if methods:
            raise ConfigError("--method has no effect on texts that are given; leave it out")
        tokenizer = getattr(processor, "tokenizer", processor)
        answers = [
            torch.tensor(tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"])
            for text in given
        ]
    elif methods:
        return trace_generation(model, processor, inputs, methods=methods, needs=needs, **options)
    else:
        with torch.inference_mode():
            output = model.generate(**inputs, **options)
        answers = answer_ids(model, output, inputs["input_ids"])
    return trace_answers(model, processor, inputs, answers, needs=needs)


# -- files ------------------------------------------------------------------------------------
def _write(path: Path, batch: Collected) -> None:
    about = {
        "units": [asdict(unit) for unit in batch.units],
        "image": list(batch.image),
        "item": list(batch.item),
        "texts": dict(batch.texts),
    }
    with reporting_write_errors(path):
        partial = path.with_suffix(".partial")
        tensors = {name: values.contiguous() for name, values in batch.features.items()}
        save_file(tensors, partial, metadata={"about": json.dumps(about)})
        partial.replace(path)


def _read(path: Path) -> Collected:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            features = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it to make it again") from error
    units = [
        Unit(**{**unit, "tokens": tuple(unit["tokens"]), "span": tuple(unit["span"])})
        for unit in about["units"]
    ]
    return Collected(units, about["image"], about["item"], features, about["texts"])


def _joined(parts: Sequence[Collected], failures: Sequence[Mapping[str, str]]) -> Collected:
    filled = [part for part in parts if part.units]
    names = filled[0].features if filled else ()
    return Collected(
        [unit for part in parts for unit in part.units],
        [image for part in parts for image in part.image],
        [item for part in parts for item in part.item],
        {name: torch.cat([part.features[name] for part in filled]) for name in names},
        {item: text for part in parts for item, text in part.texts.items()},
        failures,
    )
