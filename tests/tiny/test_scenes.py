"""The little world is the same everywhere, and its ground truth is true."""

import hashlib
import json
import random
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from vlm_steer.errors import DataError
from vlm_steer.tiny import scenes
from vlm_steer.tiny.world import CATEGORIES, PARTNERS

ROOT = Path(__file__).parents[2]
ANNOTATION_HASHES = {
    "iid": "867b5c3c190db038",
    "broken": "3010fe0950959a73",
    "validation": "e8ef3cc42eda1394",
    "training": "df4fabb3cfe193c1",
}
CAPTION_HASH = "cc389175571505b8"
PIXEL_HASHES = {
    ("iid", 0): "99c2425dcdee5c50",
    ("broken", 7): "4256185582842887",
    ("validation", 1499): "cd5f2361bd7ddc1c",
    ("broad", 3): "7931c47111c57248",
}


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def _unequal_to_constraints() -> str:
    """Why pixels cannot be compared here, or nothing."""
    path = ROOT / "constraints.txt"
    if not path.exists():
        return "constraints.txt is absent"
    pinned = dict(line.split("==") for line in path.read_text().split() if line.count("==") == 1)
    found = {name: version(name) for name in ("numpy", "pillow")}
    wrong = {name: v for name, v in found.items() if pinned.get(name) != v}
    return f"{wrong} differ from constraints.txt" if wrong else ""


@pytest.mark.parametrize("split", [*scenes.SPLITS, "training"])
def test_annotations_are_the_published_ones(split: str) -> None:
    found = scenes.training_annotations() if split == "training" else scenes.annotations(split)
    assert _digest(found) == ANNOTATION_HASHES[split]


def test_reference_captions_are_the_published_ones() -> None:
    assert _digest(scenes.reference_captions("broken")["annotations"]) == CAPTION_HASH


@pytest.mark.skipif(bool(_unequal_to_constraints()), reason=_unequal_to_constraints())
@pytest.mark.parametrize(("split", "index"), PIXEL_HASHES)
def test_pixels_are_the_published_ones(split: str, index: int) -> None:
    pixels = np.asarray(scenes.render(scenes.scene(split, index)))
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == PIXEL_HASHES[split, index]


def test_scene_ignores_and_leaves_the_global_random_state() -> None:
    first = scenes.paint(scenes.scene("iid", 3))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the legacy state is the one at risk
    before = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    second = scenes.paint(scenes.scene("iid", 3))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    assert np.array_equal(first, second)


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_boxes_enclose_visible_pixels_and_areas_count_them(split: str) -> None:
    by_image: dict[int, list[dict[str, object]]] = {}
    for annotation in scenes.annotations(split)["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    for index in range(0, 1500, 100):
        drawn = scenes.scene(split, index)
        masks = scenes.visible_masks(drawn)
        assert masks.sum(axis=0).max() <= 1, "a pixel shows two objects"
        shown = [(t, m) for t, m in zip(drawn.objects, masks, strict=True) if m.any()]
        assert len(shown) == len(by_image[drawn.image_id])
        for (thing, mask), annotation in zip(shown, by_image[drawn.image_id], strict=True):
            left, top, width, height = annotation["bbox"]
            inside = mask[top : top + height, left : left + width]
            assert inside.sum() == mask.sum() == annotation["area"]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            assert CATEGORIES[annotation["category_id"] - 1] == thing.category


def test_annotated_object_is_where_the_picture_changes() -> None:
    drawn = scenes.scene("iid", 11)
    for position in range(len(drawn.objects)):
        fewer = scenes.Scene(
            drawn.split,
            drawn.index,
            drawn.rule,
            drawn.setting,
            drawn.objects[:position] + drawn.objects[position + 1 :],
        )
        change = np.abs(scenes.paint(drawn).astype(int) - scenes.paint(fewer)).sum(axis=2) > 0
        mask = scenes.visible_masks(drawn)[position]
        assert mask[change].sum() > 0.8 * mask.sum()


def test_company_is_kept_in_iid_and_missing_in_broken() -> None:
    for split, low, high in (("iid", 0.7, 0.95), ("broken", 0.02, 0.35)):
        alone = together = 0
        for index in range(scenes.SCENES_PER_SPLIT):
            names = {thing.category for thing in scenes.scene(split, index).objects}
            for anchor, partner, rate in PARTNERS:
                if rate >= 0.75 and anchor in names:
                    together += partner in names
                    alone += partner not in names
        assert low < together / (together + alone) < high


def test_validation_is_half_and_half_and_says_which() -> None:
    rules = [entry["rule"] for entry in scenes.annotations("validation")["images"]]
    assert rules.count("iid") == rules.count("broken") == 750


def test_splits_and_training_scenes_do_not_repeat_each_other() -> None:
    drawn = [
        scenes.scene(split, index).objects
        for split in (*scenes.SPLITS, "train", "broad")
        for index in range(500)
    ]
    assert len(set(drawn)) == len(drawn)


def test_reference_captions_name_all_and_only_what_is_visible() -> None:
    truth = scenes.annotations("broken")
    present: dict[int, set[str]] = {entry["id"]: set() for entry in truth["images"]}
    for annotation in truth["annotations"]:
        present[annotation["image_id"]].add(CATEGORIES[annotation["category_id"] - 1])
    for caption in scenes.reference_captions("broken")["annotations"]:
        words = f" {caption['caption'].lower().replace('.', ' ').replace(',', ' ')} "
        named = {name for name in CATEGORIES if f" {name} " in words}
        assert named == present[caption["image_id"]]


def test_image_by_id_is_the_scene_of_that_index() -> None:
    entry = scenes.annotations("broken")["images"][42]
    same = scenes.render(scenes.scene("broken", 42))
    assert scenes.image("broken", entry["id"]).tobytes() == same.tobytes()
    assert same.size == (entry["width"], entry["height"])


def test_unknown_split_index_and_id_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="choose one of iid, broken, validation"):
        scenes.annotations("test")
    with pytest.raises(DataError, match="choose one of"):
        scenes.annotations("train")
    with pytest.raises(DataError, match="image ids run from 100000 to 101499"):
        scenes.image("iid", 200_000)
    with pytest.raises(DataError, match="1500"):
        scenes.scene("broken", 1500)
