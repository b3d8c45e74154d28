"""``vlm_steer.explain``: generate once or twice, and keep what the model did meanwhile."""

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import transformers
from PIL import Image

from vlm_steer import __version__
from vlm_steer.detection.base import Evidence
from vlm_steer.detection.recording import trace_generation
from vlm_steer.detection.store import FittedDetector
from vlm_steer.detection.trace import Trace
from vlm_steer.engine.geometry import Places, place_tokens
from vlm_steer.engine.hooks import Method
from vlm_steer.engine.model import ModelInfo, inspect_model
from vlm_steer.engine.selectors import Selector
from vlm_steer.errors import ConfigError, SteerWarning, UnsupportedModelError
from vlm_steer.explanation.checks import LogprobsWithout, check_words, dictated, read_again
from vlm_steer.explanation.lens import read_layers
from vlm_steer.explanation.result import Arm, ExplainResult
from vlm_steer.explanation.risk import (
    DetectorLike,
    load_detectors,
    position_risk,
    with_needs,
    word_risks,
)
from vlm_steer.explanation.words import split_words
from vlm_steer.generation import encode, render_prompt
from vlm_steer.images import open_image

__all__ = ["explain"]

Checks: TypeAlias = int | Literal["all"] | Sequence[str]
Picture: TypeAlias = Image.Image | str | os.PathLike[str]

_SHORT = 3


def explain(
    model: Any,
    processor: Any,
    image: Picture | Sequence[Picture],
    prompt: str,
    *,
    methods: Any = None,
    detectors: Sequence[DetectorLike] = ("logprob",),
    checks: Checks = 6,
    check_share: float = 0.1,
    lens: bool = True,
    map_layers: Selector = "all",
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> ExplainResult:
    """Take an answer apart: where each word looked, how risky it is, and whether looking mattered.

    Attention is evidence of access, not proof of cause. The checks ask about the cause: the image
    tokens that a word attended to most are cut off from all others, and the word's log-probability
    is compared with what it becomes without as many other image tokens.

    Args:
        model: A transformers vision-language model, or a PEFT model around one.
        processor: Its processor.
        image: A picture, or its file; or several, which the prompt then begins with, in order.
        prompt: The question; put into the chat template of the processor.
        methods: What to steer with, see ``vlm_steer.steer``; the unsteered answer comes along.
        detectors: Which risks to compute for every word: names, folders of fitted detectors, or
            detectors. The risk by the place alone comes along.
        checks: How many words of each answer to check, ``all``, or which ones by their text. A
            number takes the riskiest by the first detector, words of up to three letters last.
            Each costs two passes, or two generations up to the word where there is steering.
        check_share: How many image tokens a check cuts off, as a fraction in (0, 0.5].
        lens: Read every token off every layer; one more generation per answer, and the output
            head once per token and layer.
        map_layers: Decoder layers whose attention over the image is kept; all of them take
            ``tokens x layers x heads x image tokens`` half-precision numbers of memory.
        seed: Of sampling, and of the control of the checks.
        provenance: More to say at the foot of the page, such as the name of the model.
        **options: What ``generate`` takes, such as ``max_new_tokens``.

    Returns:
        The explanation; ``to_html(path)`` writes it as a page.

    Raises:
        ConfigError: An option is wrong, a detector was made for another model, has to be fitted
            first or looks at a single image, or the processor puts no image into the prompt.
        DataError: The image cannot be opened.
        UnsupportedModelError: The model cannot be steered or traced.

    Example:
        >>> import vlm_steer
        >>> from vlm_steer.tiny import scenes
        >>> model, processor = vlm_steer.load_tiny()
        >>> picture = scenes.render(scenes.scene("broken", 0))
        >>> seen = vlm_steer.explain(model, processor, picture, "Is there a dog?", checks=0)
        >>> seen.heatmap(0).shape == (picture.height, picture.width)
        True
    """
    from vlm_steer.config import dump, resolve

    steered = resolve(methods)
    _check_options(checks, check_share, options)
    pictures = _opened(image)
    info = inspect_model(model)
    fitted = load_detectors(detectors, model, processor)
    _check_single(fitted, pictures)
    whole = render_prompt(processor, prompt, n_images=len(pictures))
    inputs = encode(processor, [whole], [pictures]).to(model.device, dtype=model.dtype)
    places, why = _places(info, partial(_with_picture, processor, whole, pictures), pictures)
    options = {"do_sample": False, "num_beams": 1, **options}
    evidence = Evidence(pictures[0], whole, prompt, model, processor)
    arms = []
    for chosen in ((), steered) if steered else ((),):
        torch.manual_seed(seed)
        trace = _trace(model, processor, inputs, chosen, map_layers, options)
        trace = with_needs(trace, fitted, model, processor, inputs, is_steered=bool(chosen))
        if places is not None and trace.maps is not None:
            places, why = _fitting(places, trace.maps.shape[-1])
        words = split_words(trace)
        arm = Arm(
            name="+".join(method.name for method in chosen) or "none",
            trace=trace,
            words=words,
            risk=word_risks(trace, words, fitted, evidence),
            position=position_risk(trace, words),
        )
        # Single keys of cross-attention layers cannot be cut off.
        if places is not None and not info.has_cross_attention:
            without = (
                dictated(model, processor, inputs, trace.ids, chosen)
                if chosen
                else read_again(model, inputs, trace.ids)
            )
            arm = _checked(arm, without, checks, check_share, seed)
        if lens:
            read, why_no_lens = read_layers(model, processor, inputs, trace.ids, chosen)
            arm = replace(arm, lens=read, why_no_lens=why_no_lens)
        arms.append(arm)
    _warn_of_absent(checks, arms)
    return ExplainResult(
        images=pictures,
        prompt=prompt,
        arms=tuple(arms),
        places=places,
        why_no_map=why,
        thresholds={
            name: detector.threshold
            for name, detector in fitted.items()
            if detector.threshold is not None
        },
        provenance={
            "model": f"{type(info.model).__name__} ({info.family})",
            "dtype": str(model.dtype).removeprefix("torch."),
            "steering": dump(steered) if steered else "none",
            "generation": {name: repr(value) for name, value in options.items()},
            "seed": seed,
            "detectors": {name: _described(detector) for name, detector in fitted.items()},
            "pictures": [
                f"{picture.width} x {picture.height}, pixels {_digest(picture)} (SHA-256)"
                for picture in pictures
            ],
            "vlm_steer": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            **(provenance or {}),
        },
    )


def _opened(image: Picture | Sequence[Picture]) -> tuple[Image.Image, ...]:
    given = [image] if isinstance(image, Image.Image | str | os.PathLike) else list(image)
    if not given:
        raise ConfigError("no picture was given; an explanation is about one or more.")
    opened = (one if isinstance(one, Image.Image) else open_image(one) for one in given)
    return tuple(one.convert("RGB") for one in opened)


def _check_single(detectors: Mapping[str, FittedDetector], pictures: Sequence[Image.Image]) -> None:
    looking = [name for name, fitted in detectors.items() if fitted.detector.needs_evidence]
    if len(pictures) > 1 and looking:
        raise ConfigError(
            f"{', '.join(looking)} looks at a single picture, and {len(pictures)} were given. "
            "Leave the detector out, or give one picture."
        )


def _check_options(checks: Checks, share: float, options: Mapping[str, Any]) -> None:
    if (isinstance(checks, int) and checks < 0) or (isinstance(checks, str) and checks != "all"):
        raise ConfigError(
            f"checks is {checks!r}; give how many words to check, a list of words, or 'all'."
        )
    if not 0 < share <= 0.5:
        raise ConfigError(f"check_share is {share}; it must lie in (0, 0.5].")
    if options.get("num_return_sequences", 1) != 1:
        raise ConfigError("num_return_sequences is not 1; an explanation is about one answer.")


def _warn_of_absent(checks: Checks, arms: Sequence[Arm]) -> None:
    if isinstance(checks, int | str):
        return
    said = {word.text.casefold() for arm in arms for word in arm.words}
    absent = [word for word in checks if word.casefold() not in said]
    if absent:
        warnings.warn(
            f"no answer has the word {', '.join(map(repr, absent))}, so it was not checked.",
            SteerWarning,
            stacklevel=3,
        )


def _with_picture(
    processor: Any, prompt: str, pictures: Sequence[Image.Image], number: int, picture: Image.Image
) -> Any:
    """What the model is given when one of the pictures is another one, and the rest are white."""
    shown = [Image.new("RGB", other.size, "white") for other in pictures]
    shown[number] = picture
    return encode(processor, [prompt], [shown])


def _places(
    info: ModelInfo, prepare: Callable[[int, Image.Image], Any], pictures: Sequence[Image.Image]
) -> tuple[tuple[Places, ...] | None, str]:
    try:
        found = [
            place_tokens(info, partial(prepare, number), picture.size, image=number)
            for number, picture in enumerate(pictures)
        ]
    except UnsupportedModelError as error:
        return None, str(error)
    return tuple(found), ""


def _fitting(places: tuple[Places, ...], count: int) -> tuple[tuple[Places, ...] | None, str]:
    placed = len(places[0].boxes)
    if placed == count:
        return places, ""
    return None, f"the model attended to {count} image tokens, but {placed} were placed."


def _trace(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    methods: Sequence[Method],
    map_layers: Selector,
    options: Mapping[str, Any],
) -> Trace:
    (trace,) = trace_generation(
        model,
        processor,
        inputs,
        methods=methods,
        needs=("maps",),
        map_layers=map_layers,
        **options,
    )
    if not trace.layout.images:
        raise ConfigError(
            "the prompt holds no image tokens, so there is no image to explain. Give the processor "
            "that belongs to the model; its chat template must place the image."
        )
    return trace


def _checked(
    arm: Arm,
    without: LogprobsWithout,
    checks: Checks,
    share: float,
    seed: int,
) -> Arm:
    """The arm with some of its words checked."""
    numbers = _to_check(arm, checks)
    found = check_words(
        without,
        arm.trace.logprob,
        [arm.words[number] for number in numbers],
        [arm.attention(arm.words[number].tokens) for number in numbers],
        is_open=~arm.sinks,
        share=share,
        seed=seed,
    )
    return replace(arm, checks=dict(zip(numbers, found, strict=True)))


def _to_check(arm: Arm, checks: Checks) -> list[int]:
    """Numbers of the words to check, in order of the text."""
    numbers = range(len(arm.words))
    if checks == "all":
        return list(numbers)
    if not isinstance(checks, int):
        wanted = {word.casefold() for word in checks}
        return [number for number in numbers if arm.words[number].text.casefold() in wanted]
    risk = next(iter(arm.risk.values()), arm.position)
    is_short = [len(word.text) <= _SHORT for word in arm.words]
    return sorted(sorted(numbers, key=lambda n: (is_short[n], -risk[n]))[:checks])


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()[:16]


def _described(fitted: FittedDetector) -> dict[str, Any]:
    return {
        "options": fitted.detector.options(),
        "is_calibrated": fitted.is_calibrated,
        "made_of": dict(fitted.made_of),
    }
