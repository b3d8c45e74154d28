"""VDGD: held to its two passes made by hand, prompt by prompt and without a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import two_rows
from tests.families import zoo
from vlm_steer.engine.hooks import LogitsAt
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import ConfigError
from vlm_steer.generation import encode, render_prompt
from vlm_steer.methods.vdgd import VDGD
from vlm_steer.tiny import scenes

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

PROMPT, INTRODUCTION = (30, 40, 50), (31, 41)
N_DESCRIPTION, N_NEW = 4, 4


def method(**options: Any) -> VDGD:
    return VDGD(
        prompt_ids=PROMPT,
        introduction_ids=INTRODUCTION,
        tail=1,
        max_description_tokens=N_DESCRIPTION,
        **options,
    )


def with_ids(family: zoo.Family, row: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    """A row of other text behind the image, which has the properties of the last token."""
    changed, old = dict(row), row["input_ids"].shape[1]
    for name, value in row.items():
        if name in zoo.PER_TOKEN and value.shape[1] == old:
            more = value[:, -1:].expand(-1, max(len(ids) - old, 0))
            changed[name] = torch.cat([value, more], dim=1)[:, : len(ids)]
    return {**changed, "input_ids": torch.tensor([ids])}


def by_hand(family: zoo.Family, row: dict[str, Tensor], *, end: int = -1) -> list[int]:
    ids = row["input_ids"][0].tolist()
    markers = inspect_model(family.model).special_token_ids
    place = max(i for i, token in enumerate(ids) if token == family.image_token_id) + 1
    while ids[place] in markers:
        place += 1
    asking = with_ids(family, row, [*ids[:place], *PROMPT, ids[-1]])
    described = family.model.generate(
        **asking,
        max_new_tokens=N_DESCRIPTION,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    text = described.sequences[0, asking["input_ids"].shape[1] :].tolist()
    text = text[: text.index(end)] if end in text else text
    logits = torch.stack(described.logits, dim=1)[0, : max(len(text), 1)]
    support = logits.log_softmax(-1).amax(0)
    prompt = [*ids[:place], *INTRODUCTION, *text, *ids[place:]]
    new: list[int] = []
    for _ in range(N_NEW):
        with torch.no_grad():
            output = family.model(**with_ids(family, row, prompt + new)).logits[0, -1].float()
        ordered, order = (output / 0.5).softmax(-1).sort(descending=True)
        nucleus = order[ordered.cumsum(0) - ordered <= 0.5]
        new.append(int(nucleus[support[nucleus].argmax()]))
    return new


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_answer_is_that_of_the_two_passes_of_each_prompt_by_itself(name: str) -> None:
    family = zoo.load(name)
    rows = [family.inputs(n_text=5, seed=0), family.inputs(n_text=9, seed=1)]
    with vlm_steer.steer(family.model, method()):
        together = family.model.generate(
            **family.batch(rows), max_new_tokens=N_NEW, do_sample=False, eos_token_id=-1
        )
    for index, row in enumerate(rows):
        assert together[index, -N_NEW:].tolist() == by_hand(family, row)


def test_descriptions_of_different_length_stand_side_by_side() -> None:
    family = zoo.load("llava")
    rows = [family.inputs(n_text=5, seed=0), family.inputs(n_text=9, seed=1)]
    texts = [by_hand_description(family, row) for row in rows]
    end = texts[0][1]
    assert end not in texts[1] + texts[0][:1], "the seeds no longer fit this test"
    options = {"max_new_tokens": N_NEW, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    with vlm_steer.steer(family.model, method()):
        together = family.model.generate(**family.batch(rows), **options)[:, -N_NEW:]
    for index, row in enumerate(rows):
        expected = by_hand(family, row, end=end)
        expected = expected[: expected.index(end) + 1] if end in expected else expected
        assert together[index].tolist()[: len(expected)] == expected


def by_hand_description(family: zoo.Family, row: dict[str, Tensor]) -> list[int]:
    ids = row["input_ids"][0].tolist()
    place = max(i for i, token in enumerate(ids) if token == family.image_token_id) + 1
    asking = with_ids(family, row, [*ids[:place], *PROMPT, ids[-1]])
    output = family.model.generate(
        **asking, max_new_tokens=N_DESCRIPTION, do_sample=False, eos_token_id=-1
    )
    return output[0, -N_DESCRIPTION:].tolist()


def test_beams_sampling_and_other_methods_see_one_description() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    with vlm_steer.steer(family.model, [method(), "pai"]):
        for options in (
            {"num_beams": 3},
            {"do_sample": True, "num_return_sequences": 2},
            {"do_sample": False},
        ):
            output = family.model.generate(
                **batch,
                max_new_tokens=3,
                output_scores=True,
                return_dict_in_generate=True,
                **options,
            )
            assert all(step.isfinite().any(dim=-1).all() for step in output.scores)


def test_divided_by_the_vocabulary_the_order_stays_and_the_draw_is_all_but_even() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    support = torch.randn(2, 50, generator=torch.Generator().manual_seed(1)) - 4

    class Prepared:
        pass

    prepared: Any = Prepared()
    prepared.support = support
    at = LogitsAt(logits, {"described": logits}, 0, None, prepared)
    plain, divided = (
        method(top_p=0.99, kl_norm=norm).logits(logits, at) for norm in ("none", "vocabulary")
    )
    assert torch.equal(plain.argsort(dim=-1), divided.argsort(dim=-1))
    for row in range(2):
        kept = plain[row].isfinite()
        even, drawn = divided[row, kept].softmax(-1), plain[row, kept].softmax(-1)
        assert even.std() < 0.1 * drawn.std()


def test_it_asks_with_the_models_own_processor() -> None:
    model, processor = vlm_steer.load_tiny()
    image = scenes.render(scenes.scene("broken", 0))
    inputs = encode(processor, [render_prompt(processor, "What is here?")], [image])
    with vlm_steer.steer(model, VDGD(max_description_tokens=8), processor=processor) as steering:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert steering.effect()["vdgd"]["probability_moved"] > 0
    with pytest.raises(ConfigError, match="processor"):
        vlm_steer.attach(model, "vdgd")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_description_tokens": 0}, "max_description_tokens"),
        ({"tail": -1}, "tail"),
        ({"prompt": " "}, "prompt"),
        ({"introduction_ids": ()}, "introduction_ids"),
        ({"prompt_ids": (3,), "prompt": "What?"}, "prompt"),
        ({"layers": (0, 1)}, "layers"),
    ],
)
def test_options_outside_their_range_or_without_effect_are_refused(options, word) -> None:
    with pytest.raises(ConfigError, match=word):
        VDGD(**options)
