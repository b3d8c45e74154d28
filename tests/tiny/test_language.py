"""What is said about a scene is grammatical and asks what it should."""

import itertools

from vlm_steer.tiny import CATEGORIES, POPE_TEMPLATE, existence_question
from vlm_steer.tiny.dice import Dice
from vlm_steer.tiny.language import conversations
from vlm_steer.tiny.scenes import scene


def test_question_takes_an_before_a_vowel() -> None:
    assert existence_question("umbrella") == "Is there an umbrella in the image?"
    assert existence_question("apple", "Can you see a {}?") == "Can you see an apple?"
    assert existence_question("dog") == POPE_TEMPLATE.format("dog")


def test_no_text_says_a_before_a_vowel_or_an_before_a_consonant() -> None:
    for index in range(300):
        for turn in conversations(Dice("test", index), scene("train", index)):
            for text in turn[:2]:
                words = text.lower().split()
                for article, word in itertools.pairwise(words):
                    if article in ("a", "an") and not word.startswith("one"):
                        assert (word[0] in "aeiou") == (article == "an"), text


def test_existence_answers_follow_the_scene_and_are_balanced() -> None:
    counts = {"Yes": 0, "No": 0}
    for index in range(200):
        drawn = scene("train", index)
        names = {thing.category for thing in drawn.objects}
        for turn in conversations(Dice("test", index), drawn):
            if turn.decisive:
                asked = {
                    name for name in CATEGORIES if f" {name} " in turn.question.replace("?", " ")
                }
                assert len(asked) == 1, turn.question
                answer = turn.answer.split(",")[0]
                assert (answer == "Yes") == bool(asked & names)
                counts[answer] += 1
    assert 0.4 < counts["Yes"] / sum(counts.values()) < 0.5
