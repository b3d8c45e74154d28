"""MVP: held to captions, paths and votes made by hand, prompt by prompt."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import two_rows
from tests.families import zoo
from tests.methods.test_vdgd import with_ids
from vlm_steer import functional as F
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import ConfigError
from vlm_steer.generation import encode, render_prompt
from vlm_steer.methods.mvp import MVP
from vlm_steer.tiny import existence_question, scenes

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

VIEWS, INTRODUCTION = ((30, 40, 50), (60, 70)), (31, 41)
ANSWERS = (tuple(range(20, 60)), tuple(range(60, 100)))
N_CAPTION, N_PATH, K, SEED = 3, 4, 3, 5


def method(**options: Any) -> MVP:
    chosen: dict[str, Any] = {
        "view_ids": VIEWS,
        "view_weights": (0.7, 0.3),
        "introduction_ids": INTRODUCTION,
        "answer_ids": ANSWERS,
        "max_caption_tokens": N_CAPTION,
        "max_path_tokens": N_PATH,
        "k": K,
        "seed": SEED,
        "tail": 1,
    }
    return MVP(**chosen | options)


def drawn(logits: Tensor, waiting: Tensor, top_p: float) -> Tensor:
    """Tokens ``[rows]`` drawn at the default temperature, by a plain walk down the nucleus."""
    chosen = []
    for row, numbers in zip(logits / 0.7, waiting, strict=True):
        ordered, order = row.softmax(-1).sort(descending=True)
        kept = order[ordered.cumsum(0) - ordered <= top_p]
        chosen.append(kept[(row[kept].softmax(-1) / numbers[kept]).argmax()])
    return torch.stack(chosen)


def next_logits(family: zoo.Family, row: dict[str, Tensor], ids: list[int]) -> Tensor:
    with torch.no_grad():
        return family.model(**with_ids(family, row, ids)).logits[:, -1].float()


def scores_by_hand(family: zoo.Family, row: dict[str, Tensor]) -> Tensor:
    ids = row["input_ids"][0].tolist()
    markers = inspect_model(family.model).special_token_ids
    place = max(i for i, token in enumerate(ids) if token == family.image_token_id) + 1
    while ids[place] in markers:
        place += 1
    total = torch.zeros(len(ANSWERS))
    for view, weight in zip(VIEWS, (0.7, 0.3), strict=True):
        numbers = torch.Generator().manual_seed(SEED)
        caption: list[int] = []
        for _ in range(N_CAPTION):
            logits = next_logits(family, row, [*ids[:place], *view, ids[-1], *caption])
            waiting = torch.empty(1, zoo.VOCAB).exponential_(generator=numbers)
            caption.append(int(drawn(logits, waiting, 0.95)))
        prompt = [*ids[:place], *INTRODUCTION, *caption, *ids[place:]]
        numbers = torch.Generator().manual_seed(SEED)
        draws = [
            torch.empty(K, zoo.VOCAB).exponential_(generator=numbers) for _ in range(N_PATH - 1)
        ]
        starts = next_logits(family, row, prompt)[0].softmax(-1).topk(K)
        for path, (first, token) in enumerate(zip(*starts, strict=True)):
            text, sure = [int(token)], 1.0
            while not any(text[-1] in answer for answer in ANSWERS) and len(text) < N_PATH:
                logits = next_logits(family, row, prompt + text)
                top = logits[0].softmax(-1).topk(2).values
                sure = float(top[0] - top[1])
                waiting = draws[len(text) - 1][path : path + 1]
                text.append(int(drawn(logits, waiting, 1.0)))
            for index, answer in enumerate(ANSWERS):
                if text[-1] in answer:
                    total[index] += weight * float(first) * sure
    return total


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_scores_are_those_of_captions_and_paths_made_by_hand(name: str) -> None:
    family = zoo.load(name)
    rows = [family.inputs(n_text=5, seed=0), family.inputs(n_text=9, seed=1)]
    with vlm_steer.steer(family.model, method()) as steering:
        steering.effect()
        family.model.generate(**family.batch(rows), max_new_tokens=1, do_sample=False)
        found = steering._last.positive.prepared[0]
    for row, scores in zip(rows, found, strict=True):
        torch.testing.assert_close(scores, scores_by_hand(family, row), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "sampling", "beams", "several"],
)
def test_an_answer_begins_as_the_paths_decide_and_goes_on_as_ever(options) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    with vlm_steer.steer(family.model, method()) as steering:
        tokens = family.model.generate(**batch, max_new_tokens=3, **options)
        decided = steering._last.positive.prepared[0].argmax(dim=1)
    new = tokens[:, batch["input_ids"].shape[1] :]
    assert new.shape[1] == 3
    rows = decided[torch.arange(len(new)) * len(decided) // len(new)]
    for token, answer in zip(new[:, 0].tolist(), rows.tolist(), strict=True):
        assert token in ANSWERS[answer]


def test_the_answer_does_not_depend_on_torchs_random_state_nor_change_it() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    with vlm_steer.steer(family.model, method()):
        first = family.model.generate(**batch, max_new_tokens=2, do_sample=False)
        torch.manual_seed(7)
        second = family.model.generate(**batch, max_new_tokens=2, do_sample=False)
        left = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(first, second)
    assert torch.equal(left, torch.rand(3))


def test_a_prompt_that_no_path_answers_is_left_to_the_model() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    never = method(answer_ids=((0,), (2,)))
    base = family.model.generate(**batch, max_new_tokens=4, do_sample=False)
    with vlm_steer.steer(family.model, never):
        assert torch.equal(family.model.generate(**batch, max_new_tokens=4, do_sample=False), base)


def test_words_and_the_chat_template_of_a_processor_will_do() -> None:
    model, processor = vlm_steer.load_tiny()
    prompt = render_prompt(processor, existence_question("dog"))
    batch = encode(processor, [prompt], [scenes.render(scenes.scene("iid", 0))])
    spec = {"method": "mvp", "max_caption_tokens": 8, "max_path_tokens": 4}
    with vlm_steer.steer(model, spec, processor=processor):
        tokens = model.generate(**batch, max_new_tokens=1)
    assert processor.tokenizer.decode(tokens[0, -1]).strip() in ("Yes", "No")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"k": 0}, "k is 0"),
        ({"view_weights": (1.0,)}, "2 views and 1 view_weights"),
        ({"view_weights": (-1.0, 0.5)}, "none may be below 0"),
        ({"answer_ids": ((20,),)}, "at least two"),
        ({"answer_ids": ((20,), ())}, "each with a spelling"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"views": ("a", "b")}, "views has no effect"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        method(**options)


def test_words_without_a_processor_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="Pass processor"):
        vlm_steer.attach(zoo.load("llava").model, "mvp")


def test_answers_that_begin_alike_are_refused() -> None:
    with pytest.raises(ConfigError, match="no token of their own"):
        vlm_steer.attach(zoo.load("llava").model, method(answer_ids=((20, 21), (20, 21))))


def test_votes_are_what_the_paths_add_up_to() -> None:
    logits = torch.randn(2, 3, 4, 9) * 2
    tokens = torch.randint(0, 9, (2, 3, 4))
    mask = torch.tensor([4, 2, 1])[None, :, None].expand(2, 3, 4) > torch.arange(4)
    answers = torch.zeros(2, 9, dtype=torch.bool)
    answers[0, [0, 3]] = answers[1, [1, 4, 5]] = True
    found = F.answer_votes(logits, tokens, answers, threshold=0.1, mask=mask)
    expected = torch.zeros(2, 2)
    for row in range(2):
        for path in range(3):
            p = float(logits[row, path, 0].softmax(-1)[tokens[row, path, 0]])
            for place in range(4):
                said = answers[:, tokens[row, path, place]]
                if mask[row, path, place] and said.any():
                    top = logits[row, path, place].softmax(-1).topk(2).values
                    vote = p * float(top[0] - top[1]) * (p >= 0.1) if place else p
                    expected[row, int(said.int().argmax())] += vote
                    break
    torch.testing.assert_close(found, expected)
    assert (expected > 0).any(dim=0).all()
