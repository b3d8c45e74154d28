"""HALC: held to passes over cropped images made by hand, prompt by prompt and without a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import two_rows
from tests.detection.test_detectors import object_detector  # noqa: F401  # a fixture
from tests.families import zoo
from tests.methods.test_agla import clip  # noqa: F401  # a fixture
from vlm_steer import functional as F
from vlm_steer.engine.pictures import enlarged_parts
from vlm_steer.errors import ConfigError, UnsupportedModelError
from vlm_steer.generation import encode, render_prompt
from vlm_steer.locating import Locator
from vlm_steer.methods.halc import HALC
from vlm_steer.tagging import Tagger, ends_word, is_content_word, last_word
from vlm_steer.tiny import CAPTION_PROMPT, CATEGORIES, scenes

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

N_NEW, PATCH, SIDE = 5, 8, 32
OBJECTS = frozenset(range(zoo.FIRST_TEXT, zoo.VOCAB, 2))


def method(**options: Any) -> HALC:
    chosen: dict[str, Any] = {"word_ids": tuple(OBJECTS), "weight": 0.5, "layers": [1, 3]}
    return HALC(**chosen | options)


def generated(family: zoo.Family, batch: dict[str, Tensor], spec: Any, **options: Any) -> Tensor:
    options = {"max_new_tokens": N_NEW, "do_sample": False} | options
    with vlm_steer.steer(family.model, spec):
        tokens = family.model.generate(**batch, **options)
    return tokens[:, batch["input_ids"].shape[1] :]


def by_hand(family: zoo.Family, row: dict[str, Tensor], chosen: HALC) -> list[int]:
    """One prompt on an eager model: every token from whole passes, images cut by slicing."""
    prompt = row["input_ids"]
    is_image = prompt[0] == family.image_token_id
    side = int(is_image.sum()) ** 0.5
    cells = torch.arange(int(side)) / side + 0.5 / side
    across, down = cells.repeat(int(side)), cells.repeat_interleave(int(side))

    def passed(text: list[int], pixels: Tensor, **options: Any) -> Any:
        ids = torch.cat([prompt, torch.tensor([text], dtype=torch.long)], dim=1)
        with torch.no_grad():
            return family.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **options
            )

    text: list[int] = []
    is_judged = False
    while True:
        output = passed(text, row["pixel_values"])
        token = int(output.logits[0, -1].argmax())
        if text and text[-1] in OBJECTS and not is_judged:
            before = passed(text[:-1], row["pixel_values"], output_attentions=True)
            attention = torch.stack([before.attentions[i][0, :, -1] for i in (1, 2)]).mean((0, 1))
            weight = attention[: len(is_image)][is_image]
            weight = (weight - weight.mean()).clamp(min=0)
            weight = weight / weight.sum()
            centre = torch.stack([(weight * across).sum(), (weight * down).sum()])
            spread = torch.stack(
                [(weight * (p - c) ** 2).sum() for p, c in zip((across, down), centre, strict=True)]
            )
            reach = torch.maximum((3 * spread).sqrt(), torch.tensor(0.5 / side))
            box = torch.cat([centre - reach, centre + reach]).clamp(0, 1)
            fields = F.fields_of_view(box[None], count=chosen.fields, growth=chosen.growth)[0]
            logits = torch.stack(
                [
                    passed(text[:-1], sampled(row["pixel_values"], field)).logits[0, -1].float()
                    for field in fields
                ]
            )
            proposed = F.focal_contrasts(
                logits[None], candidates=chosen.n_candidates, weight=chosen.weight
            )[0].argmax(-1)
            own = before.logits[0, -1]
            best = int(proposed[own[proposed].argmax()])
            is_judged = best != text[-1]
            text[-1] = best
            if is_judged:
                continue
        is_judged = False
        text.append(token)
        if len(text) == N_NEW:
            return text


def sampled(pixels: Tensor, box: Tensor) -> Tensor:
    """A part of an image at the image's size, pixel by pixel from its four neighbours."""
    height, width = pixels.shape[-2:]
    seen = torch.empty_like(pixels)
    for i in range(height):
        for j in range(width):
            y = float(box[1] + (box[3] - box[1]) * (i + 0.5) / height) * height - 0.5
            x = float(box[0] + (box[2] - box[0]) * (j + 0.5) / width) * width - 0.5
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = int(y), int(x)
            low, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            upper = pixels[..., top, left] * (1 - dx) + pixels[..., top, right] * dx
            lower = pixels[..., low, left] * (1 - dx) + pixels[..., low, right] * dx
            seen[..., i, j] = upper * (1 - dy) + lower * dy
    return seen


def test_it_is_the_plain_search_of_each_prompt_by_itself() -> None:
    family, eager = zoo.load("llava"), zoo.load("llava", attn_implementation="eager")
    rows = [family.inputs(n_text=5, seed=2), family.inputs(n_text=9, seed=3)]
    base = generated(family, family.batch(rows), None)
    found = generated(family, family.batch(rows), method())
    for row, tokens in zip(rows, found, strict=True):
        assert tokens.tolist() == by_hand(eager, row, method())
    assert not torch.equal(found, base)


def test_what_is_replaced_leaves_no_trace_in_the_cache() -> None:
    family = zoo.load("qwen2_5_vl")
    batch = two_rows(family)
    options = {"max_new_tokens": N_NEW, "return_dict_in_generate": True, "output_logits": True}
    with vlm_steer.steer(family.model, method()) as steering:
        output = family.model.generate(**batch, **options, do_sample=False)
        assert steering.effect()["halc"]["choices_changed"] > 0
    again = family.batch([family.inputs(n_text=5, seed=0), family.inputs(n_text=9, seed=1)])
    new = output.sequences[:, batch["input_ids"].shape[1] :]
    for name, value in again.items():
        if name in zoo.PER_TOKEN:
            again[name] = torch.cat([value, value[:, -1:].expand(-1, N_NEW)], dim=1)
    again["input_ids"] = output.sequences
    with torch.no_grad():
        expected = family.model(**again).logits[:, -N_NEW - 1 : -1]
    torch.testing.assert_close(
        torch.stack(output.logits, dim=1), expected.float(), rtol=1e-3, atol=1e-3
    )
    assert new.shape[1] == N_NEW


@pytest.mark.parametrize("images", [1, 2])
def test_rows_that_are_read_apart_and_together_give_the_same(images: int) -> None:
    family = zoo.load("llava")
    rows = [family.inputs(n_text=n, seed=n, images=images) for n in (5, 9)]
    together = generated(family, family.batch(rows), method())
    for row, tokens in zip(rows, together, strict=True):
        assert torch.equal(generated(family, family.batch([row]), method())[0], tokens)


def test_texts_that_end_are_padded_and_stay_ended_when_others_take_a_token_back() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    free = generated(family, batch, method())
    end = next(t for t in free[0].tolist()[:-1] if t not in free[1].tolist())
    ended = generated(family, batch, method(), eos_token_id=end, pad_token_id=0)
    place = free[0].tolist().index(end)
    assert ended[0].tolist()[: place + 1] == free[0].tolist()[: place + 1]
    assert set(ended[0].tolist()[place + 1 :]) <= {0}
    assert ended[1].tolist() == free[1].tolist()


def test_several_sequences_are_sampled_by_the_users_options() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0}
    tokens = generated(family, batch, method(), **options)
    assert tokens.shape == (6, N_NEW)
    assert len({tuple(row) for row in tokens.tolist()}) > 2
    cold = generated(family, batch, method(), do_sample=True, temperature=1e-4)
    assert torch.equal(cold, generated(family, batch, method()))


def test_a_token_that_generate_rules_out_is_never_proposed() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    free = generated(family, batch, method())
    base = generated(family, batch, None)
    new = sorted(set(free.flatten().tolist()) - set(base.flatten().tolist()))
    tokens = generated(family, batch, method(), suppress_tokens=new)
    assert not set(new) & set(tokens.flatten().tolist())


def test_a_stream_gets_what_is_final() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs(n_text=5, seed=2)])
    seen: list[int] = []

    class Kept(transformers.generation.BaseStreamer):
        def put(self, value: Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            seen.append(-1)

    tokens = generated(family, batch, method(), streamer=Kept())
    assert seen[-N_NEW - 1 :] == [*tokens[0].tolist(), -1]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_the_whole_field_is_the_picture_and_a_part_changes_its_own_picture_alone(name) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    pixels = batch["pixel_values"]
    info = vlm_steer.engine.model.inspect_model(family.model)
    kinds = torch.where(family.expected_image_mask(batch), 2, 3)
    grid = vlm_steer.engine.grid.grid_of(
        info.geometry, kinds, vlm_steer.engine.grid.grids_among(batch), 1
    )
    shapes = [shape for row in grid.shapes for shape in row]
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(shapes), 1)
    assert torch.equal(enlarged_parts(batch, shapes, whole), pixels)
    nearly = whole.clone()
    nearly[0, 2] = 1 - 1e-6
    torch.testing.assert_close(enlarged_parts(batch, shapes, nearly), pixels, atol=1e-3, rtol=0)
    part = whole.clone()
    part[0] = torch.tensor([0.25, 0.25, 0.75, 0.75])
    changed = enlarged_parts(batch, shapes, part)
    half = len(pixels) // 2
    assert not torch.equal(changed[:half], pixels[:half])
    assert torch.equal(changed[half:], pixels[half:])


# -- words, and models beside the steered one ---------------------------------------------------
def test_words_end_where_another_token_begins_no_part_of_them() -> None:
    assert last_word("a tall fire-truck") == "fire-truck"
    assert last_word("a truck.") == ""
    assert ends_word("a truck", "a truck is")
    assert ends_word("a truck", "a truck.")
    assert ends_word("a truck", "a truck")
    assert not ends_word("a truck", "a trucks")
    assert not ends_word("a truck\ufffd", "a truckß")
    assert is_content_word("Truck")
    assert not is_content_word("Beside")


def captioned(spec: Any, n: int = 2) -> tuple[list[str], Any]:
    model, processor = vlm_steer.load_tiny()
    images = [scenes.render(scenes.scene("broken", i)) for i in range(n)]
    batch = encode(processor, [render_prompt(processor, CAPTION_PROMPT)] * n, images)
    with vlm_steer.steer(model, spec, processor=processor) as steering:
        tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return processor.batch_decode(tokens, skip_special_tokens=True), steering.effect()


def test_words_of_a_list_are_looked_at_and_no_others(monkeypatch) -> None:
    asked: list[str] = []
    kept = vlm_steer.methods._halc.Search._objects

    def objects(self: Any, tokens: Tensor) -> dict[int, str]:
        found = kept(self, tokens)
        asked.extend(found.values())
        return found

    monkeypatch.setattr(vlm_steer.methods._halc.Search, "_objects", objects)
    captioned({"method": "halc", "words": list(CATEGORIES)})
    assert asked
    assert set(asked) <= set(CATEGORIES)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tagger with the tokenizer of the embedded model."""
    folder = tmp_path_factory.mktemp("tagger")
    _, processor = vlm_steer.load_tiny()
    config = transformers.BertConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "DET", 1: "NOUN", 2: "VERB"},
        label2id={"DET": 0, "NOUN": 1, "VERB": 2},
    )
    torch.manual_seed(0)
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return folder


def test_a_tagger_reads_the_last_word_of_every_text(tagger: Path) -> None:
    found = Tagger.load(tagger)
    texts = ["a dog", "there is a red car", "grass"]
    alone = []
    for text in texts:
        tokens = found.tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
        is_special = tokens.pop("special_tokens_mask")[0].bool()
        labels = found.model(**tokens).logits[0].argmax(-1)[~is_special]
        alone.append(int(labels[-1]) == 1)
    assert found.end_with_noun(texts) == alone
    assert [Tagger.is_noun(label) for label in ("NNS", "B-PROPN", "VERB")] == [True, True, False]


def test_a_detector_gives_boxes_over_the_threshold_the_best_first(object_detector) -> None:  # noqa: F811
    locator = Locator.load(object_detector)
    picture = torch.rand(3, 20, 30)
    boxes = locator.find(picture, "dog", threshold=0.0)
    assert boxes.shape[1] == 4
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    assert len(locator.find(picture, "dog", threshold=1.0)) == 0


def test_a_tagger_a_detector_and_a_matcher_can_be_named(tagger, object_detector, clip) -> None:  # noqa: F811
    spec = {
        "method": "halc",
        "tagger": str(tagger),
        "detector": object_detector,
        "matcher": str(clip),
        "threshold": 0.9,
        "weight": 0.5,
    }
    together, effect = captioned(spec)
    assert effect["halc"]["choices_changed"] >= 0
    assert len(together) == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"fields": 1}, "fields is 1"),
        ({"n_candidates": 3}, "even"),
        ({"fields": 2, "n_candidates": 4}, "2 to 2"),
        ({"growth": 0.0}, "growth is 0"),
        ({"weight": -1.0}, "weight is -1"),
        ({"threshold": 0.3}, "threshold has no effect"),
        ({"detector": "x"}, "word_ids name no object"),
        ({"word_ids": None, "tagger": "x", "words": ("dog",)}, "words has no effect"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        method(**options)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    model = zoo.load("llava").model
    with pytest.raises(ConfigError, match="Pass processor"):
        vlm_steer.attach(model, "halc")
    with pytest.raises(ConfigError, match="num_beams is 3"):
        generated(zoo.load("llava"), two_rows(zoo.load("llava")), method(), num_beams=3)
    with pytest.raises(UnsupportedModelError, match="zero-shot object detector"):
        Locator.load(tmp_path)
    with pytest.raises(ConfigError, match="part-of-speech tagger"):
        Tagger.load(tmp_path)
