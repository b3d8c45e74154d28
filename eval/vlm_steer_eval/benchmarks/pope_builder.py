"""POPE questions for any set of images whose objects are known.

`build_pope` is seeded per image, so that the questions of an image depend on nothing but the seed,
the image and the statistics; it writes correct articles and stops with a message where the original
loops forever. `official_pope` follows the released generator draw by draw, for comparison with it.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vlm_steer.errors import DataError

from .pope import Answer

__all__ = [
    "POPE_TEMPLATE",
    "STRATEGIES",
    "BuiltQuestion",
    "ImageObjects",
    "ObjectStatistics",
    "build_pope",
    "images_from_instances",
    "object_statistics",
    "official_pope",
    "official_question_text",
    "question_text",
]

Strategy = Literal["random", "popular", "adversarial"]

STRATEGIES: tuple[Strategy, ...] = ("random", "popular", "adversarial")
POPE_TEMPLATE = "Is there a {} in the image?"
"""The question of POPE (arXiv 2305.10355)."""


class ImageObjects(NamedTuple):
    """An image (file name or id) and its distinct objects, in annotation order."""

    image: str
    objects: tuple[str, ...]


class BuiltQuestion(NamedTuple):
    """One yes/no question; `asked` is the object it asks about."""

    question_id: int
    image: str
    text: str
    label: Answer
    asked: str

    def as_row(self) -> dict[str, Any]:
        """The question as a line of a POPE file."""
        return {
            "question_id": self.question_id,
            "image": self.image,
            "text": self.text,
            "label": self.label,
        }


@dataclass(frozen=True)
class ObjectStatistics:
    """How often objects occur, and with what.

    Attributes:
        frequency: number of images per object, in order of first appearance.
        companions: object -> objects seen beside it, most frequent first.
    """

    frequency: Mapping[str, int]
    companions: Mapping[str, tuple[str, ...]]

    @property
    def by_frequency(self) -> tuple[str, ...]:
        """Objects, most frequent first; ties in order of first appearance."""
        return tuple(sorted(self.frequency, key=lambda name: -self.frequency[name]))


def object_statistics(images: Iterable[ImageObjects]) -> ObjectStatistics:
    """Count objects and pairs of objects over images."""
    frequency: Counter[str] = Counter()
    beside: dict[str, Counter[str]] = {}
    for image in images:
        frequency.update(image.objects)
        for name in image.objects:
            beside.setdefault(name, Counter()).update(
                other for other in image.objects if other != name
            )
    companions = {
        name: tuple(sorted(seen, key=lambda other: -seen[other])) for name, seen in beside.items()
    }
    return ObjectStatistics(dict(frequency), companions)


def images_from_instances(instances: Mapping[str, Any]) -> list[ImageObjects]:
    """Images and their distinct objects from a COCO-format instances dictionary, in file order.

    Raises:
        DataError: a key is missing, or an annotation names an unknown image or category.
    """
    try:
        names = {category["id"]: str(category["name"]) for category in instances["categories"]}
        files = {image["id"]: str(image["file_name"]) for image in instances["images"]}
        objects: dict[Any, dict[str, None]] = {image_id: {} for image_id in files}
        for annotation in instances["annotations"]:
            objects[annotation["image_id"]][names[annotation["category_id"]]] = None
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the annotations are not in COCO instances format (at {error}); expected "
            "images (id, file_name), categories (id, name) and annotations (image_id, category_id)"
        ) from error
    return [ImageObjects(files[image_id], tuple(found)) for image_id, found in objects.items()]


def question_text(name: str, template: str = POPE_TEMPLATE) -> str:
    """The question with the article that the object's name needs."""
    if name[0].lower() in "aeiou":
        template = template.replace(" a {}", " an {}")
    return template.format(name)


def official_question_text(name: str, template: str = POPE_TEMPLATE) -> str:
    """The question as released: before a vowel every "a" of the template becomes "an"."""
    return (template.replace("a", "an") if name[0] in "aeiou" else template).format(name)


def build_pope(
    images: Sequence[ImageObjects],
    strategy: Strategy,
    *,
    statistics: ObjectStatistics | None = None,
    per_image: int = 3,
    seed: int = 0,
    template: str = POPE_TEMPLATE,
) -> list[BuiltQuestion]:
    """Ask about up to `per_image` present objects of each image and as many absent ones.

    Args:
        images: images and their objects; an image without objects gets no question.
        strategy: how absent objects are chosen: at random, by frequency, or by co-occurrence with
            the present object asked just before.
        statistics: where frequency and co-occurrence come from; the images themselves by default.
        per_image: present objects asked per image, > 0.
        seed: seed of the choice of objects.
        template: question with `{}` for the object.

    Raises:
        DataError: an image has fewer absent names than questions to ask.
    """
    statistics = statistics or object_statistics(images)
    questions: list[BuiltQuestion] = []
    for image in sorted(images):
        stream = random.Random(f"{seed}/{strategy}/{image.image}")
        present = sorted(image.objects)
        positives = stream.sample(present, min(per_image, len(present)))
        questions += _ask(
            image, positives, strategy, statistics, stream, template, question_text, len(questions)
        )
    return questions


def official_pope(
    images: Sequence[ImageObjects],
    *,
    seed: int,
    n_images: int = 500,
    per_image: int = 3,
    template: str = POPE_TEMPLATE,
) -> dict[Strategy, list[BuiltQuestion]]:
    """The three splits as the released generator draws them after `random.seed(seed)`.

    Raises:
        DataError: too few images, or an image for which the original would never end.
    """
    stream = random.Random(seed)
    eligible = [image for image in images if len(image.objects) >= per_image]
    if len(eligible) < n_images:
        raise DataError(
            f"{n_images} images were asked for, but only {len(eligible)} of the given ones have "
            f"{per_image} objects or more; ask for fewer"
        )
    chosen = stream.sample(eligible, n_images)
    statistics = object_statistics(chosen)
    splits: dict[Strategy, list[BuiltQuestion]] = {}
    for strategy in STRATEGIES:
        questions: list[BuiltQuestion] = []
        for image in chosen:
            positives = image.objects[:per_image]
            questions += _ask(
                image,
                positives,
                strategy,
                statistics,
                stream,
                template,
                official_question_text,
                len(questions),
            )
        splits[strategy] = questions
    return splits


def _ask(
    image: ImageObjects,
    positives: Sequence[str],
    strategy: Strategy,
    statistics: ObjectStatistics,
    stream: random.Random,
    template: str,
    phrase: Callable[[str, str], str],
    n_before: int,
) -> list[BuiltQuestion]:
    names = list(statistics.frequency)
    excluded = set(image.objects)
    n_absent = len(set(names) - excluded)
    if n_absent < len(positives):
        raise DataError(
            f"image {image.image}: {len(positives)} absent objects are needed but only {n_absent} "
            f"of the {len(names)} known names are absent from it; ask fewer or leave it out"
        )
    questions: list[BuiltQuestion] = []
    for positive in positives:
        negative = _ranked_choice(strategy, positive, statistics, excluded) or _draw(
            stream, names, excluded
        )
        excluded.add(negative)
        for name, label in ((positive, "yes"), (negative, "no")):
            number = n_before + len(questions) + 1
            answer: Answer = "yes" if label == "yes" else "no"
            questions.append(
                BuiltQuestion(number, image.image, phrase(name, template), answer, name)
            )
    return questions


def _ranked_choice(
    strategy: Strategy, positive: str, statistics: ObjectStatistics, excluded: set[str]
) -> str | None:
    ranking: Sequence[str] = ()
    if strategy == "popular":
        ranking = statistics.by_frequency
    elif strategy == "adversarial":
        ranking = statistics.companions.get(positive, ())
    return next((name for name in ranking if name not in excluded), None)


def _draw(stream: random.Random, names: Sequence[str], excluded: set[str]) -> str:
    # Rejection, not a choice among the remaining names: the released generator consumes draws this
    # way.
    while (name := stream.choice(names)) in excluded:
        pass
    return name
