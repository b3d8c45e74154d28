"""Answers beside their pictures, with what is invented marked, for HTML reports.

What a gallery adds to a page is bounded: so many samples, and so many bytes of pictures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer.report import Gallery, MarkedText, Sample, Span, thumbnail
from vlm_steer_eval.running.images import FileImage, ImageError, ImageSource, SceneImage
from vlm_steer_eval.running.runs import RunArm, Runs

__all__ = ["marked_answer", "runs_gallery", "truth_of"]

_PICTURE_BYTES = 4_000_000
_SCENES = ("iid", "broken", "validation")


def marked_answer(arm: str, text: str, details: Mapping[str, Any]) -> MarkedText:
    """An answer with marks: hallucinated words of a caption, or the whole of a yes or no.

    Args:
        arm: whose answer it is.
        text: the answer.
        details: how it was scored.
    """
    if "mentions" in details:
        spans = [
            Span(
                mention["span"][0],
                mention["span"][1],
                "wrong" if mention["hallucinated"] else "right",
                f"{mention['object']}: "
                f"{'not in the image' if mention['hallucinated'] else 'there'}",
            )
            for mention in details["mentions"]
            if mention["span"] is not None
        ]
        return MarkedText(arm, text, tuple(spans), f"{details['hallucinated']} hallucinated")
    if "parsed" not in details or "label" not in details:
        return MarkedText(arm, text, (), str(details.get("note", "")))
    right = details["parsed"] == details["label"]
    read = "unread" if details["parsed"] is None else f"read as {details['parsed']}"
    whole = (Span(0, len(text), "right" if right else "wrong", read),) if text else ()
    return MarkedText(arm, text, whole, read)


def truth_of(facts: Mapping[str, Any]) -> str:
    """What is right, from an item's `gold` or a row of `samples.jsonl`."""
    if "label" in facts:
        return str(facts["label"])
    if "objects" not in facts:
        return str(facts.get("truth", ""))
    return ", ".join(sorted(facts["objects"])) or "no object of the vocabulary"


def runs_gallery(runs: Runs, *, images: Path | None = None, n_samples: int = 12) -> Gallery | None:
    """The answers of compared runs, those first on which the arms differ; one per image.

    Args:
        runs: from `load_runs`.
        images: folder of images that the runs name without saying where they lie.
        n_samples: how many at most, >= 0.

    Returns:
        None where the runs kept no answers, or none are wanted.
    """
    arms = list(runs.arms.values())
    common = [unit for unit in arms[0].units if all(unit in arm.samples for arm in arms)]
    chosen = _telling(common, arms)[:n_samples]
    if not chosen:
        return None
    room = _PICTURE_BYTES
    samples = []
    for unit in chosen:
        row = arms[0].samples[unit]
        picture = _picture(str(row.get("image", row.get("image_id", ""))), images)
        room -= len(picture)
        samples.append(
            Sample(
                image=picture if room >= 0 else "",
                title=str(row.get("image", row.get("image_id", unit))),
                prompt=str(row.get("question", row.get("prompt", ""))),
                truth=truth_of(row),
                answers=tuple(_answer(arm, unit) for arm in arms),
            )
        )
    note = "Red: hallucinated. Green: right. Images on which the arms differ most come first."
    return Gallery("Examples", samples, note)


def _answer(arm: RunArm, unit: str) -> MarkedText:
    row = arm.samples[unit]
    return marked_answer(arm.name, str(row.get("caption", row.get("text", ""))), row)


def _telling(units: Sequence[str], arms: Sequence[RunArm]) -> list[str]:
    """One unit per image, those with the most different counts first."""

    def variety(unit: str) -> int:
        return len({tuple(arm.units[unit].counts) for arm in arms})

    by_image: dict[str, str] = {}
    for unit in sorted(units, key=lambda unit: (-variety(unit), unit)):
        by_image.setdefault(arms[0].units[unit].cluster, unit)
    return list(by_image.values())


def _picture(name: str, folder: Path | None) -> str:
    """A thumbnail as a data URI; empty where the picture cannot be found or read."""
    for source in _sources(name, folder):
        try:
            return thumbnail(source.load())
        except (ImageError, DataError):
            continue
    return ""


def _sources(name: str, folder: Path | None) -> list[ImageSource]:
    split, _, number = name.partition("/")
    if split in _SCENES and number.isdigit():
        return [SceneImage(split, int(number))]
    paths = [Path(name)] if folder is None else [folder / name, folder / Path(name).name]
    return [FileImage(path) for path in paths if path.is_file()]
