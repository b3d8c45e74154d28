"""What the commands about detectors do once their options are read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vlm_steer._yaml import parse_yaml
from vlm_steer.config import resolve
from vlm_steer.detection import (
    Detector,
    Evidence,
    FittedDetector,
    Trace,
    build_detector,
    list_detectors,
    made_for,
    token_units,
    trace_answers,
    trace_generation,
)
from vlm_steer.detection.hub import is_place
from vlm_steer.errors import ConfigError, DataError, SteerError
from vlm_steer.generation import answer_ids, encode, render_prompt
from vlm_steer.images import open_image
from vlm_steer.loading import load_model
from vlm_steer_eval.benchmarks.chair import TableNormaliser
from vlm_steer_eval.benchmarks.vocabulary import ObjectVocabulary
from vlm_steer_eval.files import write_json, write_text

from .data import Collected, Settings, collect, split_images
from .labels import Labelled, mention_units
from .run import CONTROLS, Recipe, evaluate, fit, table

__all__ = ["fit_and_judge", "judge", "parse_detectors", "rate"]

BASELINES = (*CONTROLS, "logprob", "entropy")
"""What stands in every table."""


def parse_detectors(names: Sequence[str], settings: Sequence[str]) -> dict[str, Detector]:
    """Detectors by name, with options written as `name.option=value`.

    Raises:
        ConfigError: a detector or an option does not exist, or is set for one that is not there.
    """
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        key, equals, value = setting.partition("=")
        name, dot, option = key.partition(".")
        if not (equals and dot) or name not in options:
            known = ", ".join(options) or "those given by name; fitted ones have theirs in them"
            raise ConfigError(f"--set {setting!r}: write DETECTOR.OPTION=VALUE for one of {known}")
        options[name][option] = parse_yaml(value, f"--set {setting}", with_lines=False)[0]
    return {name: build_detector(name, given) for name, given in options.items()}


def fit_and_judge(
    detectors: Mapping[str, Detector],
    source: Labelled,
    model_name: str,
    loading: Mapping[str, Any],
    output: Path,
    recipe: Recipe,
    *,
    settings: Settings,
    resamples: int,
) -> tuple[str, list[Path]]:
    """Fit on 60 % of the images, calibrate on 20 %, judge on 20 %; returns table and folders."""
    for detector in detectors.values():
        recipe.check(detector)
    folders = {name: output if len(detectors) == 1 else output / name for name in detectors}
    model, processor = load_model(model_name, **loading)
    about = made_for(model, processor)
    for name, detector in detectors.items():
        _refuse_to_replace(folders[name], detector, recipe, about)
    everything = {**{name: build_detector(name) for name in BASELINES}, **detectors}
    data = _labelled(source, model, processor, everything, settings, output, model_name)
    parts = split_images(data.image, recipe.seed)
    plain = Recipe(calibrator=recipe.calibrator, seed=recipe.seed)
    fitted = {
        name: fit(detector, data, about, recipe if name in detectors else plain, parts=parts)
        for name, detector in everything.items()
    }
    for name, folder in folders.items():
        fitted[name].save_pretrained(folder)
    test = data.where(torch.tensor([part == "test" for part in parts]))
    result = evaluate(fitted, test, n_resamples=resamples, seed=recipe.seed)
    return _report(result, data, output), list(folders.values())


def _refuse_to_replace(
    folder: Path, detector: Detector, recipe: Recipe, about: Mapping[str, Any]
) -> None:
    """Raise ConfigError where a folder holds what the same command would not have made."""
    if not (folder / "detector.json").is_file():
        return
    try:
        known = FittedDetector.from_pretrained(folder)
    except SteerError:
        return  # what a kill left half written, or damaged, is no loss
    wanted = asdict(recipe)
    made = {option: known.made_of.get(option) for option in wanted}
    if known.detector != detector or made != wanted or known.differing(about):
        raise ConfigError(
            f"{folder} holds a detector {known.detector.name} of other options or another model, "
            "which would be replaced; give another --output, or remove it"
        )


def judge(
    names: Sequence[str],
    settings: Sequence[str],
    source: Labelled,
    model_name: str,
    loading: Mapping[str, Any],
    output: Path,
    *,
    run: Settings,
    base_rate: float | None,
    resamples: int,
    seed: int,
) -> str:
    """Judge detectors on all images of a source; returns the table."""
    model, processor = load_model(model_name, **loading)
    chosen = _loaded(names, settings, model, processor, base_rate)
    chosen = {**{name: FittedDetector(build_detector(name)) for name in BASELINES}, **chosen}
    looks = {name: fitted.detector for name, fitted in chosen.items()}
    data = _labelled(source, model, processor, looks, run, output, model_name)
    result = evaluate(chosen, data, n_resamples=resamples, seed=seed)
    return _report(result, data, output)


def _labelled(
    source: Labelled,
    model: Any,
    processor: Any,
    detectors: Mapping[str, Detector],
    settings: Settings,
    output: Path,
    model_name: str,
) -> Collected:
    folder = output / "batches"
    data = collect(source, model, processor, detectors, settings, folder, model_name=model_name)
    return data.labelled


def _report(result: Mapping[str, Any], data: Collected, output: Path) -> str:
    text = table(result)
    for failure in data.failures:
        text += f"left out {failure['item']}: {failure['error']}\n"
    write_json(output / "detection.json", {**result, "excluded": list(data.failures)})
    write_text(output / "table.md", text)
    return text


def _loaded(
    names: Sequence[str],
    settings: Sequence[str],
    model: Any,
    processor: Any,
    base_rate: float | None,
) -> dict[str, FittedDetector]:
    """Detectors by folder or name, and at a base rate where they are calibrated."""
    known = list_detectors()
    plain = [name for name in names if name in known and not Path(name, "detector.json").is_file()]
    found = {
        name: FittedDetector(detector)
        for name, detector in parse_detectors(plain, settings).items()
    }
    for name in found:
        if found[name].detector.must_be_fitted:
            raise ConfigError(
                f"{name} has to be fitted before it can be used: vlm-steer detect fit {name} "
                "--output DIR, then give DIR"
            )
    for name in names:
        if name in plain:
            continue
        if not is_place(name):
            build_detector(name)  # says which names there are
        fitted = FittedDetector.from_pretrained(name, model, processor)
        key = fitted.detector.name
        if base_rate is not None:
            fitted = fitted.at_base_rate(base_rate)
        found[key if key not in found else name] = fitted
    if base_rate is not None and not any(fitted.is_calibrated for fitted in found.values()):
        raise ConfigError(
            f"--base-rate {base_rate} has no effect: {', '.join(names)} give no probabilities. Fit "
            "one: vlm-steer detect fit"
        )
    return found


def rate(
    name: str,
    settings: Sequence[str],
    images: Sequence[Path],
    prompt: str,
    model_name: str,
    loading: Mapping[str, Any],
    *,
    text: str | None,
    method: str,
    every_token: bool,
    max_new_tokens: int,
    base_rate: float | None,
) -> list[dict[str, Any]]:
    """Rate the words of one text per image."""
    methods = resolve(method)
    if methods and text is not None:
        raise ConfigError("--method has no effect on a text that is given; leave it out")
    if text is not None and not text.strip():
        raise ConfigError("--text is empty; give a text, or leave it out to have one generated")
    pictures = [open_image(path) for path in images]
    model, processor = load_model(model_name, **loading)
    ((_, fitted),) = _loaded([name], settings, model, processor, base_rate).items()
    rows = []
    for path, picture in zip(images, pictures, strict=True):
        asked = render_prompt(processor, prompt)
        inputs = encode(processor, [asked], [picture]).to(model.device, dtype=model.dtype)
        trace = _one_trace(model, processor, inputs, fitted.detector, methods, text, max_new_tokens)
        units = token_units(trace)
        if not every_token:
            reader = TableNormaliser(ObjectVocabulary.coco())
            units = mention_units(trace, reader, None, mentions="all")
        risks = fitted.risk(trace, units, Evidence(picture, asked, prompt, model, processor))
        if bool(risks.isnan().any()):
            raise DataError(
                f"{name}: {int(risks.isnan().sum())} of {len(units)} risks are no numbers on "
                f"{path}. Run the model in float32 or bfloat16, or repair its weights."
            )
        rows.append(
            {
                "image": str(path),
                "text": trace.text.strip(),
                "detector": fitted.detector.name,
                "calibrated": fitted.is_calibrated,
                "threshold": fitted.threshold,
                "units": [
                    {
                        "text": trace.text[slice(*unit.span)],
                        "span": list(unit.span),
                        "object": unit.name,
                        "risk": risk,
                        "flagged": fitted.threshold is not None and risk > fitted.threshold,
                    }
                    for unit, risk in zip(units, risks.tolist(), strict=True)
                ],
            }
        )
    return rows


def _one_trace(
    model: Any,
    processor: Any,
    inputs: Any,
    detector: Detector,
    methods: Any,
    text: str | None,
    max_new_tokens: int,
) -> Trace:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
    if methods:
        needs = detector.needs
        return trace_generation(model, processor, inputs, methods=methods, needs=needs, **options)[
            0
        ]
    if text is None:
        with torch.inference_mode():
            output = model.generate(**inputs, **options)
        answers = answer_ids(model, output, inputs["input_ids"])
    else:
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]
        answers = [torch.tensor(ids)]
    return trace_answers(model, processor, inputs, answers, needs=detector.needs)[0]
