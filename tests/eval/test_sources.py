"""Items from files, data sets and the embedded scenes."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.running.hub import (
    CHAIR_COLUMNS,
    POPE_COLUMNS,
    hub_chair,
    hub_pope,
    parse_columns,
)
from vlm_steer_eval.running.images import BytesImage, FileImage, ImageError, SceneImage
from vlm_steer_eval.running.runner import check_images
from vlm_steer_eval.running.sources import (
    built_pope,
    embedded_chair,
    embedded_pope,
    local_chair,
    local_pope,
    subset,
)


@given(st.sets(st.text(min_size=1, max_size=5), max_size=30), st.integers(0, 5), st.integers(1, 9))
def test_a_subset_is_stable_whatever_the_order_and_grows_with_its_limit(names, seed, limit):
    chosen = subset(names, limit, seed)
    assert chosen == subset(sorted(names, reverse=True), limit, seed)
    assert len(chosen) == min(limit, len(names))
    assert set(chosen) <= set(subset(names, limit + 3, seed))
    assert subset(names, None) == sorted(names)


def test_question_files_become_splits_named_by_their_files(question_file, image_folder, tmp_path):
    other = tmp_path / "pope_popular.jsonl"
    other.write_text(question_file.read_text())
    task = local_pope([question_file, other], image_folder, suffix=" Answer yes or no.")
    assert {item.split for item in task.items} == {"random", "popular"}
    assert len({item.id for item in task.items}) == 16
    assert task.items[0].prompt == "Is there a car in the image? Answer yes or no."
    limited = local_pope([question_file, other], image_folder, limit=2)
    assert len({item.cluster for item in limited.items}) == 2
    assert len(limited.items) == 8
    with pytest.raises(DataError, match="does not exist"):
        local_pope([question_file], tmp_path / "nowhere")


def test_real_pope_files_in_both_formats_are_read(data_folder):
    photographs = data_folder / "images"
    task = local_pope([photographs / "mini_pope.jsonl"], photographs)
    assert len(task.items) == 61
    assert task.items[0].image.load().mode == "RGB"
    task = local_pope([data_folder / "pope/gqa/gqa_pope_seem_random.json"], photographs)
    assert len(task.items) == 3000


@pytest.fixture
def instances(image_folder, tmp_path):
    names = ["car", "dog", "bus", "zeppelin", "cup", "kite"]
    table = {
        "images": [{"id": i, "file_name": f"scene_{i}.png"} for i in range(4)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": image, "category_id": (image + step) % len(names)}
            for image in range(4)
            for step in range(2)
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(table))
    return path


def test_a_question_that_names_no_image_is_left_out_and_counted(tmp_path):
    rows = [
        {"question_id": n, "image": image, "text": "Is there a dog?", "label": "no"}
        for n, image in enumerate((None, "a.png", None))
    ]
    path = tmp_path / "pope_random.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    task = local_pope([path], tmp_path)
    assert len({item.cluster for item in task.items}) == 3
    digests, failures = check_images(task.items)
    assert list(digests) == ["random/1"]
    assert "question 0 names no image" in failures[0]["error"]


def test_pope_is_built_from_a_coco_format_file(instances, image_folder):
    task = built_pope(instances, image_folder, splits=["random", "adversarial"], limit=3)
    assert {item.split for item in task.items} == {"random", "adversarial"}
    assert len({item.cluster for item in task.items}) == 3
    labels = [item.gold["label"] for item in task.items]
    assert labels.count("yes") == labels.count("no")


def test_chair_truth_comes_from_instances_or_object_sets(instances, image_folder, tmp_path):
    task = local_chair(image_folder, annotations=instances)
    assert {item.id: list(item.gold["objects"]) for item in task.items} == {
        "0": ["car", "dog"],
        "1": ["bus", "dog"],
        "2": ["bus", "zeppelin"],
        "3": ["cup", "zeppelin"],
    }
    # The shipped table has no zeppelins, so the vocabulary is that of the file.
    read = task.normaliser.read("two zeppelins and a car")
    assert [mention.object for mention in read.mentions] == ["zeppelin", "car"]
    objects = tmp_path / "objects.json"
    objects.write_text(json.dumps({"names": ["dog", "cat"], "objects": {"1": [0], "99": [1]}}))
    task = local_chair(image_folder, objects=objects)
    assert [(item.id, item.gold["objects"]) for item in task.items] == [("1", ["dog"])]
    assert task.normaliser.name == "table"
    objects.write_text(json.dumps({"names": ["dog"], "objects": {"77": [0]}}))
    with pytest.raises(DataError, match="none of the 4 images"):
        local_chair(image_folder, objects=objects)
    with pytest.raises(ConfigError, match="either"):
        local_chair(image_folder)
    objects.write_text(json.dumps({"names": ["dog"]}))
    with pytest.raises(DataError, match="not an object-set file"):
        local_chair(image_folder, objects=objects)


def test_embedded_scenes_give_true_balanced_questions_and_captions():
    from vlm_steer.tiny.scenes import annotations

    table = annotations("iid")
    names = {category["id"]: category["name"] for category in table["categories"]}
    truth: dict[int, set[str]] = {}
    for annotation in table["annotations"]:
        truth.setdefault(annotation["image_id"], set()).add(names[annotation["category_id"]])
    task = embedded_pope("iid", limit=4)
    assert {item.split for item in task.items} == {"random", "popular", "adversarial"}
    for item in task.items:
        holds = item.gold["asked"] in truth[item.image.image_id]
        assert holds == (item.gold["label"] == "yes")
    captions = embedded_chair("iid", limit=4)
    assert {i.image.image_id for i in captions.items} == {i.image.image_id for i in task.items}
    for item in captions.items:
        assert set(item.gold["objects"]) == truth[item.image.image_id]


@pytest.fixture
def table_folder(image_folder, tmp_path):
    """A data set as the hub stores one."""
    import datasets

    rows = {
        "question_id": [1, 2],
        "question": ["Is there a car?", "Is there a dog?"],
        "answer": ["yes", "No"],
        "image": [{"bytes": (image_folder / f"scene_{i}.png").read_bytes()} for i in range(2)],
        "category": ["popular", "popular"],
        "image_id": [7, 8],
        "objects": [["car"], ["bus", "dog"]],
    }
    folder = tmp_path / "table"
    folder.mkdir()
    features = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    features.to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def test_a_data_set_is_read_by_its_columns(table_folder, image_folder):
    task = hub_pope(str(table_folder), "test", columns="split=category")
    assert [(item.id, item.split, item.gold["label"]) for item in task.items] == [
        ("popular/1", "popular", "yes"),
        ("popular/2", "popular", "no"),
    ]
    file = FileImage(image_folder / "scene_0.png")
    assert task.items[0].image.digest() == file.digest()
    assert task.items[0].image.load().tobytes() == file.load().tobytes()
    captions = hub_chair(str(table_folder), "test", limit=1)
    assert len(captions.items) == 1
    with pytest.raises(ConfigError, match=r"no column text.*question"):
        hub_pope(str(table_folder), "test", columns="question=text")
    with pytest.raises(DataError, match="expected yes or no"):
        hub_pope(str(table_folder), "test", columns="label=question")
    with pytest.raises(DataError, match="cannot be loaded"):
        hub_pope(str(table_folder / "absent"), "test")


def test_a_data_set_is_read_as_a_stream_up_to_its_limit(table_folder):
    whole = hub_pope(str(table_folder), "test")
    stream = hub_pope(str(table_folder), "test", limit=2, streaming=True)
    assert [item.id for item in stream.items] == [item.id for item in whole.items]
    assert [i.image.digest() for i in stream.items] == [i.image.digest() for i in whole.items]
    first = hub_pope(str(table_folder), "test", limit=1, streaming=True)
    assert [item.id for item in first.items] == [whole.items[0].id]
    with pytest.raises(ConfigError, match="--limit"):
        hub_pope(str(table_folder), "test", streaming=True)
    with pytest.raises(ConfigError, match=r"no column text.*question"):
        hub_pope(str(table_folder), "test", columns="question=text", streaming=True, limit=1)


def test_an_empty_or_damaged_cell_of_a_data_set_is_an_unusable_image(table_folder, image_folder):
    import datasets

    good = (image_folder / "scene_0.png").read_bytes()
    cells = [{"bytes": cell, "path": None} if cell else None for cell in (good, None, good[:50])]
    rows = [
        {"question_id": n, "question": "Is there a dog?", "answer": "no", "image": cell}
        for n, cell in enumerate(cells)
    ]
    features = datasets.Features(
        question_id=datasets.Value("int64"), question=datasets.Value("string"),
        answer=datasets.Value("string"), image=datasets.Image(),
    )  # fmt: skip
    folder = table_folder.parent / "holes"
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "test.parquet")
    for options in ({}, {"streaming": True, "limit": 9}):
        task = hub_pope(str(folder), "test", **options)
        digests, failures = check_images(task.items)
        assert (list(digests), [f["item"] for f in failures]) == (
            ["test/0"], ["test/1", "test/2"]
        )  # fmt: skip


def test_column_mappings_are_checked():
    assert parse_columns("label=gold, id=qid", POPE_COLUMNS)["label"] == "gold"
    assert parse_columns(None, CHAIR_COLUMNS) == CHAIR_COLUMNS
    for wrong in ("label", "label=", "colour=x"):
        with pytest.raises(ConfigError, match="role=column"):
            parse_columns(wrong, POPE_COLUMNS)


def test_images_are_told_apart_by_content_and_refused_by_name(image_folder, tmp_path):
    first, second = (FileImage(image_folder / f"scene_{i}.png") for i in range(2))
    assert first.digest() != second.digest()
    assert SceneImage("iid", 100_000).digest() != SceneImage("iid", 100_001).digest()
    with pytest.raises(ImageError, match=r"gone\.png does not exist"):
        FileImage(tmp_path / "gone.png").digest()
    with pytest.raises(ImageError, match="row 3 is not an image"):
        BytesImage("row 3", b"hello").load()
    buffer = io.BytesIO()
    first.load().save(buffer, format="PNG")
    with pytest.raises(ImageError, match="row 4 is damaged or incomplete"):
        BytesImage("row 4", buffer.getvalue()[:-200]).load()
    turned, exif = Image.new("RGB", (4, 2)), Image.Exif()
    exif[0x0112] = 6  # what cameras write when they are held upright
    buffer = io.BytesIO()
    turned.save(buffer, format="JPEG", exif=exif)
    assert BytesImage("row 6", buffer.getvalue()).load().size == (2, 4)
    with pytest.raises(ImageError, match="expected an image column"):
        BytesImage.from_cell("text", "row 5")
