"""Branches whose prompt holds text that the user's has not."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.settings import families
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from vlm_steer.engine.hooks import Branch, Columns, Insertion, LogitsAt, Method
from vlm_steer.engine.model import inspect_model
from vlm_steer.engine.prompts import edit_of
from vlm_steer.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

TEXT = (30, 40, 50)
Where = Literal["instruction", "start", "system", "question", "end"]


@dataclass(frozen=True, kw_only=True)
class Edited(Method):
    """Keeps what a stream with inserted text says."""

    where: Where = "instruction"
    seen: list[Tensor] = field(default_factory=list)

    def branches(self) -> tuple[Branch, ...]:
        return (Branch("edited", insert=Insertion(TEXT, where=self.where, tail=1)),)

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        self.seen.append(at.branches["edited"])
        return logits - 0.3 * at.branches["edited"]


Edited.name = "edited"


def edited(family: zoo.Family, row: dict[str, Tensor], where: Where) -> dict[str, Tensor]:
    """A row with the text put in by hand."""
    ids = row["input_ids"][0].tolist()
    image = [i for i, token in enumerate(ids) if token == family.image_token_id]
    markers = inspect_model(family.model).special_token_ids
    place = int(ids[0] == zoo.BOS)
    source = list(range(len(ids)))
    if where in ("instruction", "question"):
        place = next(i for i in range(image[-1] + 1, len(ids)) if ids[i] not in markers)
    elif where == "end":
        place = len(ids) - 1
    elif where == "system":
        source = [i for i in source if i < place or i >= image[0] or ids[i] in markers]
    if where == "question":
        source = source[:place] + source[-1:]
    # New tokens see of the image what the text around them sees.
    like = 0 if where in ("start", "system") else len(ids) - 1
    source = source[:place] + [like] * len(TEXT) + source[place:]
    changed = dict(row)
    for name, value in row.items():
        if name in zoo.PER_TOKEN and value.shape[1] == len(ids):
            changed[name] = value[:, source]
    changed["input_ids"][0, place : place + len(TEXT)] = torch.tensor(TEXT)
    return changed


def check_third_step(family: zoo.Family, where: Where, **options: object) -> None:
    rows = [family.inputs(n_text=5, seed=0), family.inputs(n_text=9, seed=1)]
    method = Edited(where=where)
    with vlm_steer.steer(family.model, method):
        output = family.model.generate(
            **family.batch(rows),
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
    tokens = output.sequences[:, -4:]
    for row in range(2):
        alone = family.batch([edited(family, rows[row], where)])
        expected = said(family, alone, tokens[row])
        assert_close(method.seen[3][row : row + 1, None], expected[:, None])


def said(family: zoo.Family, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits for the last token, ``[1, vocabulary]``, by full forwards without a cache."""
    length = batch["input_ids"].shape[1]

    def force(_: int, ids: Tensor) -> list[int]:
        return [int(tokens[ids.shape[0] - length])]

    output = family.model.generate(
        **batch,
        max_new_tokens=len(tokens),
        do_sample=False,
        use_cache=family.name == "instructblip",  # without a cache it loses its image
        prefix_allowed_tokens_fn=force,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits: Tensor = output.logits[-1]
    return logits


@pytest.mark.parametrize("name", families())
def test_text_in_front_of_the_question_equals_a_full_forward_of_that_prompt(name: str) -> None:
    check_third_step(zoo.load(name), "instruction")


@pytest.mark.parametrize("where", ["start", "system", "question", "end"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mllama"])
def test_text_elsewhere_equals_a_full_forward_of_that_prompt(name: str, where: Where) -> None:
    check_third_step(zoo.load(name), where)


def test_a_branch_with_other_text_encodes_no_image_again() -> None:
    family = zoo.load("llava")
    batch, calls = two_rows(family), []
    hook = family.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        with vlm_steer.steer(family.model, Edited()):
            for options in ({}, {"num_beams": 2}):
                generate(family, batch, **options)
    finally:
        hook.remove()
    assert len(calls) == 2  # one per generation


def test_the_instruction_of_a_q_former_is_changed_and_the_prompt_is_not() -> None:
    family = zoo.load("instructblip")
    row = family.inputs(n_text=5)
    seen: list[Tensor] = []

    class Recording(vlm_steer.get_method("icd")):  # type: ignore[misc]
        def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
            seen.append(at.branches["disturbed"])
            return super().logits(logits, at)  # type: ignore[no-any-return]

    for where in ("instruction", "system"):
        with vlm_steer.steer(family.model, Recording(disturbance_ids=TEXT, where=where)):
            generate(family, family.batch([row]), max_new_tokens=1)
        text = torch.tensor([TEXT])
        if where == "instruction":
            text = torch.cat([text, row["qformer_input_ids"]], dim=1)
        changed = row | {"qformer_input_ids": text, "qformer_attention_mask": torch.ones_like(text)}
        with torch.no_grad():
            expected = family.model(**family.batch([changed])).logits[:, -1:].float()
        assert_close(seen.pop()[:, None], expected)


def test_every_row_has_a_place_of_its_own() -> None:
    pad, system, image, question = (
        Columns.PADDING,
        Columns.SYSTEM,
        Columns.IMAGE,
        Columns.INSTRUCTION,
    )
    kinds = torch.tensor(
        [
            [system, image, image, question, question],
            [pad, pad, system, image, question],
            [pad, system, system, system, system],
        ],
        dtype=torch.int8,
    )
    ids = torch.tensor([[1, 9, 9, 20, 21], [0, 0, 1, 9, 22], [0, 1, 23, 24, 25]])
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 1, 2, 3]])

    def applied(where: Where, tail: int = 0) -> tuple[list[list[int]], list[list[int]]]:
        insertion = Insertion((7, 8), where=where, tail=tail, markers=(1,))
        edit = edit_of(insertion, kinds, ids, begin=(1,))
        new = edit.with_new(ids, torch.tensor([[7, 8]]).expand(3, 2))
        kept = [row[mask].tolist() for row, mask in zip(new, edit.is_token, strict=True)]
        counted = edit.of_positions(positions)
        return kept, [row[mask].tolist() for row, mask in zip(counted, edit.is_token, strict=True)]

    tokens, places = applied("instruction")
    assert tokens == [[1, 9, 9, 7, 8, 20, 21], [1, 9, 7, 8, 22], [1, 7, 8, 23, 24, 25]]
    assert places == [list(range(7)), list(range(5)), list(range(6))]
    tokens, places = applied("end")
    assert tokens == [[1, 9, 9, 20, 21, 7, 8], [1, 9, 22, 7, 8], [1, 23, 24, 25, 7, 8]]
    assert places == [list(range(7)), list(range(5)), list(range(6))]
    assert applied("end", tail=1)[0][1] == [1, 9, 7, 8, 22]
    assert applied("start")[0][0] == [1, 7, 8, 9, 9, 20, 21]


def test_the_system_prompt_is_replaced_up_to_the_image() -> None:
    kinds = torch.tensor(
        [[Columns.SYSTEM] * 3 + [Columns.IMAGE, Columns.INSTRUCTION]], dtype=torch.int8
    )
    ids = torch.tensor([[1, 20, 21, 9, 22]])
    edit = edit_of(Insertion((7,), where="system"), kinds, ids, begin=(1,))
    assert edit.with_new(ids, torch.tensor([[7]])).tolist() == [[1, 7, 9, 22]]
    assert edit.of_positions(torch.arange(5)[None]).tolist() == [[0, 1, 2, 3]]
    assert edit.kinds.tolist() == [[Columns.SYSTEM] * 2 + [Columns.IMAGE, Columns.INSTRUCTION]]


@pytest.mark.parametrize("spec", ["icd", "lqcd"])
def test_text_without_a_processor_is_refused_when_attaching(spec: str) -> None:
    family = zoo.load("llava")
    with pytest.raises(ConfigError, match=f"{spec} adds text .* processor"):
        vlm_steer.attach(family.model, spec)
    assert "generate" not in vars(family.model)


def test_image_tokens_are_no_text() -> None:
    family = zoo.load("llava")
    with pytest.raises(ConfigError, match="standing for an image"):
        vlm_steer.attach(family.model, {"method": "icd", "disturbance_ids": [zoo.IMAGE]})


def test_a_question_whose_end_nobody_knows_is_asked_for() -> None:
    family = zoo.load("llava")
    with pytest.raises(ConfigError, match="tail"):
        vlm_steer.attach(family.model, {"method": "lqcd", "leading_ids": [20]})


def test_the_chat_template_tells_where_the_question_ends() -> None:
    model, processor = vlm_steer.load_tiny()
    handle = vlm_steer.attach(model, "lqcd", processor=processor)
    ((branch,),) = [bound.branches for bound in handle.plan.bounds]
    handle.detach()
    ids = processor.tokenizer(" ASSISTANT:", add_special_tokens=False)["input_ids"]
    assert branch.insert is not None
    assert branch.insert.tail == len(ids)
    text = processor.tokenizer("It seems like there isn't.", add_special_tokens=False)
    assert branch.insert.text == tuple(text["input_ids"])
