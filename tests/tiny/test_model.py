"""The shipped model is an ordinary model directory, and it hallucinates the way it is meant to."""

import re
import socket

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import vlm_steer.tiny as tiny
from vlm_steer.errors import ConfigError
from vlm_steer.tiny.scenes import Scene, render, scene
from vlm_steer.tiny.world import CATEGORIES, PARTNERS

SCENES = 60
Pair = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny.load_tiny()


def _prompt(processor: LlavaProcessor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def _answers(
    pair: Pair, asked: list[tuple[Scene, str]], *, max_new_tokens: int, batch_size: int = 30
) -> list[str]:
    model, processor = pair
    texts: list[str] = []
    for start in range(0, len(asked), batch_size):
        chunk = asked[start : start + batch_size]
        inputs = processor(
            images=[render(drawn) for drawn, _ in chunk],
            text=[_prompt(processor, question) for _, question in chunk],
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts += processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return [text.strip() for text in texts]


def test_model_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model, processor = tiny.load_tiny()
    assert not model.training
    assert model.dtype == torch.float32
    assert isinstance(processor, LlavaProcessor)


def test_asked_dtype_is_the_dtype_of_every_weight() -> None:
    model, _ = tiny.load_tiny(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_seed_that_is_not_shipped_is_refused_with_the_way_to_train_it() -> None:
    with pytest.raises(ConfigError, match=r"vlm_steer\.tiny\.train --output DIR --seed 7"):
        tiny.load_tiny(7)


def test_auto_classes_load_the_directory(pair: Pair) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny.model_dir())
    processor = AutoProcessor.from_pretrained(tiny.model_dir())
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(processor, LlavaProcessor)
    for name, weight in pair[0].state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_weights_are_at_most_nine_megabytes() -> None:
    size = sum(path.stat().st_size for path in tiny.model_dir().iterdir())
    assert size <= 9_000_000


def test_processor_writes_one_placeholder_for_each_image_feature(pair: Pair) -> None:
    model, processor = pair
    inputs = processor(
        images=render(scene("iid", 0)),
        text=_prompt(processor, tiny.CAPTION_PROMPT),
        return_tensors="pt",
    )
    n_placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert n_placeholders == len(features[0]) == model.config.image_seq_length == 64
    assert inputs["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id


def test_chat_template_with_tokens_gives_the_ids_of_the_plain_prompt(pair: Pair) -> None:
    _, processor = pair
    drawn = render(scene("iid", 0))
    content = [{"type": "image", "image": drawn}, {"type": "text", "text": "Is there a dog?"}]
    direct = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    plain = processor(
        images=drawn, text="USER: <image>\nIs there a dog? ASSISTANT:", return_tensors="pt"
    )
    assert direct["input_ids"].tolist() == plain["input_ids"].tolist()
    assert torch.equal(direct["pixel_values"], plain["pixel_values"])


def test_every_category_is_one_token_but_traffic_light(pair: Pair) -> None:
    tokenizer = pair[1].tokenizer
    lengths = {n: len(tokenizer.encode(f" {n}", add_special_tokens=False)) for n in CATEGORIES}
    assert {name for name, length in lengths.items() if length != 1} == {"traffic light"}
    assert lengths["traffic light"] == 2


def test_any_text_survives_the_tokenizer(pair: Pair) -> None:
    tokenizer = pair[1].tokenizer
    text = "Is there an übergroße dog in the imange?\n\t42 — ja"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_padded_rows_answer_like_single_ones(pair: Pair) -> None:
    asked = [
        (scene("iid", 1), "Is there a dog in the image?"),
        (scene("broken", 2), tiny.CAPTION_PROMPT),
    ]
    together = _answers(pair, asked, max_new_tokens=24)
    alone = [_answers(pair, [one], max_new_tokens=24)[0] for one in asked]
    assert together == alone


def test_it_sees_and_guesses_from_company_where_company_is_missing(pair: Pair) -> None:
    """Present objects are affirmed, strangers denied, missing partners affirmed more often."""
    asked: list[tuple[Scene, str]] = []
    kinds: list[str] = []
    for index in range(SCENES):
        drawn = scene("broken", index)
        names = [thing.category for thing in drawn.objects]
        missing = {p for a, p, _ in PARTNERS if a in names and p not in names}
        related = {p for a, p, _ in PARTNERS if a in names} | set(names)
        stranger = next(
            name for name in CATEGORIES[index % 24 :] + CATEGORIES if name not in related
        )
        for kind, members in (
            ("present", names),
            ("missing", sorted(missing)),
            ("stranger", [stranger]),
        ):
            asked += [(drawn, tiny.existence_question(name)) for name in members]
            kinds += [kind] * len(members)
    answers = _answers(pair, asked, max_new_tokens=1)
    assert set(answers) == {"Yes", "No"}
    rates = {
        kind: sum(a == "Yes" for a, k in zip(answers, kinds, strict=True) if k == kind)
        / kinds.count(kind)
        for kind in ("present", "missing", "stranger")
    }
    assert rates["present"] > 0.7, rates
    assert rates["stranger"] < 0.2, rates
    assert rates["missing"] > rates["stranger"] + 0.08, rates


def test_captions_of_broken_scenes_invent_an_eighth_of_their_objects(pair: Pair) -> None:
    first, later = _false_mentions(pair)
    assert 0.12 < (sum(first) + sum(later)) / (len(first) + len(later)) < 0.55


def test_captions_of_broken_scenes_invent_more_later_than_first(pair: Pair) -> None:
    first, later = _false_mentions(pair)
    assert len(first) >= 0.9 * SCENES, "captions without objects"
    assert sum(later) / len(later) > sum(first) / len(first)


def _false_mentions(pair: Pair) -> tuple[list[bool], list[bool]]:
    """Whether each caption's first mention, and each later one, names what is not there."""
    drawn = [scene("broken", index) for index in range(SCENES)]
    captions = _answers(pair, [(one, tiny.CAPTION_PROMPT) for one in drawn], max_new_tokens=128)
    first, later = [], []
    for one, caption in zip(drawn, captions, strict=True):
        names = {thing.category for thing in one.objects}
        mentions = re.findall("|".join(sorted(CATEGORIES, key=len, reverse=True)), caption.lower())
        false = [mention not in names for mention in mentions]
        first += false[:1]
        later += false[1:]
    return first, later
