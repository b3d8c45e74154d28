"""Controls on logits: what they change, by how much, and nothing else."""

import pytest
import torch

import vlm_steer
from tests.contract.test_contract import generate, two_rows
from tests.families import zoo
from vlm_steer.errors import ConfigError
from vlm_steer.functional import plausibility_mask

YES, NO = [20, 21], [30]


def test_the_bias_moves_the_margin_of_every_first_token_by_itself() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    base = generate(family, batch)
    spec = {"method": "yes_bias", "bias": 1.5, "yes_ids": YES, "no_ids": NO}
    with vlm_steer.steer(family.model, spec):
        steered = generate(family, batch, max_new_tokens=1)
    for ids, change in ((YES, 0.75), (NO, -0.75)):
        moved = steered[:, 0, ids] - base[:, 0, ids]
        torch.testing.assert_close(moved, torch.full_like(moved, change), atol=1e-5, rtol=0)
    others = [i for i in range(base.shape[-1]) if i not in YES + NO]
    assert torch.equal(steered[:, 0, others], base[:, 0, others])


def test_later_tokens_are_changed_only_on_request() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    spec = {"method": "yes_bias", "bias": 0.001, "yes_ids": YES, "no_ids": NO}
    base = generate(family, batch)
    for steps, is_same in (("first", True), ("all", False)):
        with vlm_steer.steer(family.model, spec | {"steps": steps}):
            steered = generate(family, batch)
        assert torch.equal(steered[:, 1:], base[:, 1:]) == is_same


def test_a_large_bias_answers_every_question_alike() -> None:
    model, processor = vlm_steer.load_tiny()
    ids = processor.tokenizer("<s>USER: Is there a dog? ASSISTANT:", return_tensors="pt").input_ids
    answers = []
    for bias in (40.0, -40.0):
        with vlm_steer.steer(model, {"method": "yes_bias", "bias": bias}, processor=processor):
            output = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
        answers.append(processor.tokenizer.decode(output[0, -1:]).strip().lower())
    assert answers == ["yes", "no"]


def test_the_mask_rules_out_what_is_less_likely_than_beta_times_the_best() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    base = generate(family, batch)
    with vlm_steer.steer(family.model, {"method": "plausibility_mask", "beta": 0.3}):
        steered = generate(family, batch)
    kept = plausibility_mask(base, beta=0.3)
    assert torch.equal(steered, base.masked_fill(~kept, -torch.inf))
    assert (~kept).any()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "processor"),
        ({"yes_ids": [1]}, "go together"),
        ({"yes_ids": [1], "no_ids": [1]}, "no token of their own"),
        ({"yes_ids": [], "no_ids": [1]}, "yes_ids is empty"),
        ({"bias": float("inf")}, "bias"),
        ({"bias": 0.0, "steps": "all"}, "steps has no effect"),
        ({"yes": ["si"], "yes_ids": [1], "no_ids": [2]}, "yes has no effect"),
    ],
)
def test_a_bias_without_words_of_its_own_is_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        vlm_steer.attach(zoo.load("llava").model, {"method": "yes_bias", **options})
