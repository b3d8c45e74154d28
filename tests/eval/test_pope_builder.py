"""Building POPE questions, as released and better."""

import itertools
from collections import Counter

import pytest

from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.pope_builder import (
    STRATEGIES,
    ImageObjects,
    build_pope,
    images_from_instances,
    object_statistics,
    official_pope,
    official_question_text,
    question_text,
)

IMAGES = [
    ImageObjects("b.png", ("dog", "apple")),
    ImageObjects("a.png", ("dog", "cat", "bus", "cup")),
    ImageObjects("c.png", ("dog", "bus")),
    ImageObjects("d.png", ("orange", "fork")),
    ImageObjects("e.png", ()),
]


def test_released_generator_is_followed_draw_by_draw(golden):
    reference = golden("pope_builder.json")
    images = [ImageObjects(row["image"], tuple(row["objects"])) for row in reference["annotations"]]
    by_name = {image.image: image for image in images}
    for case in reference["cases"]:
        splits = official_pope(
            images,
            seed=case["seed"],
            n_images=case["img_num"],
            per_image=case["sample_num"],
            template=case["template"],
        )
        for strategy in STRATEGIES:
            rows = [question.as_row() for question in splits[strategy]]
            assert rows == case["questions"][strategy]
        statistics = object_statistics([by_name[name] for name in case["selected_images"]])
        assert dict(statistics.frequency) == case["ground_truth_objects"]
        companions = {name: list(others) for name, others in statistics.companions.items()}
        assert companions == case["co_occur"]
    for row in reference["create_question"]:
        assert official_question_text(row["obj"], row["template"]) == row["text"]


def test_official_coco_negatives_are_maximal_under_our_statistics(golden):
    rows = golden("pope_coco_rebuild.json")["images"]
    statistics = object_statistics(
        ImageObjects(row["image"], tuple(row["objects"])) for row in rows
    )
    counts = statistics.frequency
    together = Counter(
        frozenset(pair) for row in rows for pair in itertools.combinations(row["objects"], 2)
    )
    fallbacks = 0
    for row in rows:
        excluded = set(row["objects"])
        for name in row["negatives"]["popular"]:
            assert counts[name] == max(counts[n] for n in counts if n not in excluded)
            excluded.add(name)
        excluded = set(row["objects"])
        for positive, name in zip(row["positives"], row["negatives"]["adversarial"], strict=True):
            best = next((n for n in statistics.companions[positive] if n not in excluded), None)
            fallbacks += best is None
            if best is not None:
                assert (
                    together[frozenset((positive, best))] == together[frozenset((positive, name))]
                )
            excluded.add(name)
    assert fallbacks == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_questions_are_balanced_true_and_independent_of_the_image_order(strategy):
    questions = build_pope(IMAGES, strategy, seed=5)
    assert questions == build_pope(
        IMAGES[::-1], strategy, seed=5, statistics=object_statistics(IMAGES)
    )
    objects = dict(IMAGES)
    for question in questions:
        assert (question.asked in objects[question.image]) == (question.label == "yes")
    labels = [question.label for question in questions]
    assert labels.count("yes") == labels.count("no") == 9
    assert len({(question.image, question.asked) for question in questions}) == len(questions)
    assert [question.question_id for question in questions] == list(range(1, 19))


def test_popular_and_adversarial_take_the_likeliest_absent_object():
    popular = build_pope(IMAGES, "popular", per_image=1)
    asked = {q.image: q.asked for q in popular if q.label == "no"}
    assert asked["d.png"] == "dog"
    assert asked["c.png"] == "apple"
    adversarial = build_pope(IMAGES, "adversarial", per_image=2)
    asked = {
        yes.image: {yes.asked: no.asked}
        for yes, no in zip(adversarial[::2], adversarial[1::2], strict=True)
        if yes.asked == "dog"
    }
    # Beside a dog: bus twice, then apple, cat and cup once each, in order of appearance.
    assert asked["b.png"] == {"dog": "bus"}
    assert asked["c.png"]["dog"] in {"apple", "cat", "cup"}


def test_articles_are_right_and_the_rest_of_the_sentence_is_left_alone():
    assert question_text("apple") == "Is there an apple in the image?"
    assert question_text("car") == "Is there a car in the image?"
    assert official_question_text("apple") == "Is there an apple in the imange?"


def test_an_image_that_holds_every_name_is_refused_instead_of_looping_forever():
    crowded = [ImageObjects("x.png", ("dog", "cat")), ImageObjects("y.png", ("dog",))]
    with pytest.raises(DataError, match=r"x\.png"):
        build_pope(crowded, "random", per_image=1)
    with pytest.raises(DataError, match=r"x\.png"):
        official_pope(crowded, seed=0, n_images=1, per_image=2)


def test_instances_in_another_format_are_refused_by_the_missing_key():
    with pytest.raises(DataError, match="categories"):
        images_from_instances({"images": []})
    good = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 3, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 3}, {"image_id": 1, "category_id": 3}],
    }
    assert images_from_instances(good) == [ImageObjects("a.png", ("dog",))]
