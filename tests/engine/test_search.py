"""What a search can rely on when it takes tokens back."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import two_rows
from tests.families import zoo
from vlm_steer.engine.hooks import Asked, Decoding, Found, Method, SearchSetup

END, OTHER = 7, 9


@dataclass(frozen=True, kw_only=True)
class _EndsAndTakesBack(Method):
    """Ends the first row at its first token and the second at its third, then takes two back."""

    name: ClassVar[str] = "ends_and_takes_back"
    seen: ClassVar[list[Tensor]] = []

    def search_setup(self, asked: Asked) -> SearchSetup:
        return SearchSetup(rows=1, takes_back=True)

    def search(self, decoding: Decoding) -> Found:
        for tokens in ((END, OTHER), (OTHER, OTHER), (OTHER, END)):
            if decoding.is_finished:
                break
            decoding.append(torch.tensor(tokens))
        self.seen.append(decoding.is_done)
        decoding.take_back(2)
        self.seen.append(decoding.is_done)
        decoding.append(torch.tensor((OTHER, OTHER)))
        self.seen.append(decoding.ids[:, decoding.prompt_length :])
        return Found(decoding.ids, decoding.trace)


@pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")
def test_texts_that_had_ended_before_what_is_taken_back_stay_ended() -> None:
    family = zoo.load("llava")
    method = _EndsAndTakesBack()
    method.seen.clear()
    with vlm_steer.steer(family.model, method):
        family.model.generate(
            **two_rows(family), max_new_tokens=6, do_sample=False, eos_token_id=END, pad_token_id=0
        )
    before, after, ids = method.seen
    assert before.tolist() == [True, True]
    assert after.tolist() == [True, False]
    assert ids.tolist() == [[END, 0], [OTHER, OTHER]]
