"""OPERA: held to a plain search that keeps no cache, shares no pass and knows no rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import two_rows
from tests.families import zoo
from vlm_steer import functional as F
from vlm_steer.errors import ConfigError, UnsupportedModelError
from vlm_steer.methods.opera import OPERA

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

N_NEW = 6
STRONG = {"beams": 2, "n_candidates": 3, "weight": 1e6}
# Random models have no summary tokens: a column counts as one at its second time.
RESTLESS = STRONG | {"threshold": 1, "rollbacks": 2}


@pytest.fixture(scope="module")
def family() -> zoo.Family:
    return zoo.load("llava")


@pytest.fixture(scope="module")
def batch(family: zoo.Family) -> dict[str, Tensor]:
    return two_rows(family)


def generated(family: zoo.Family, batch: dict[str, Tensor], method: OPERA, **options: Any) -> Any:
    options = {"max_new_tokens": N_NEW, "do_sample": False} | options
    with vlm_steer.steer(family.model, method):
        return family.model.generate(**batch, **options)


class Plain:
    """The search over one prompt, text by text, every text in a pass of its own."""

    def __init__(self, family: zoo.Family, row: dict[str, Tensor], method: OPERA):
        self.family, self.row, self.method = family, row, method
        self.prompt = row["input_ids"]
        self.tried: dict[int, list[set[int]]] = {}
        self.known: dict[tuple[int, ...], Any] = {}

    def run(self) -> list[int]:
        beams = [([], 0.0, [])]
        paths: dict[tuple[int, ...], float] = {}
        while True:
            offers = [(beam, self.offer(beam[0])) for beam in beams]
            length = len(beams[0][0]) + 1
            penalty, anchors = {}, []
            for (text, _, _), tokens in offers:
                found = [self.penalty([*text, t]) for t, _ in tokens] if length < N_NEW else []
                penalty[tuple(text)] = [p for p, _ in found] or [0.0] * len(tokens)
                anchors.append(mode([c for _, c in found]) if found else -1)
            kept = self.place(beams, anchors, length) if length < N_NEW else None
            if kept is not None:
                places = {
                    t[kept] for (text, _, _), tokens in offers for t in self.ends(text, tokens)
                }
                self.tried.setdefault(kept, []).append(places)
                for place, followed in self.tried.items():
                    if place > kept:
                        followed[:] = [set() for _ in followed]
                texts = list(dict.fromkeys(tuple(b[0][:kept]) for b in beams))
                beams = [
                    (list(t), paths[t], b[2][:kept])
                    for t in texts
                    for b in [next(b for b in beams if tuple(b[0][:kept]) == t)]
                ]
                continue
            longer = []
            for ((text, score, history), tokens), anchor in zip(offers, anchors, strict=True):
                raw = torch.tensor([s for _, s in tokens])
                raw = raw - self.method.weight * torch.tensor(penalty[tuple(text)])
                for (token, _), part in zip(tokens, raw.log_softmax(-1).tolist(), strict=True):
                    paths[(*text, token)] = score + part
                    longer.append(([*text, token], score + part, [*history, anchor]))
            longer.sort(key=lambda beam: -beam[1])
            beams = longer[: self.method.beams]
            if length == N_NEW:
                return beams[0][0]

    def ends(self, text: list[int], tokens: list[tuple[int, float]]) -> list[list[int]]:
        return [[*text, token] for token, _ in tokens]

    def offer(self, text: list[int]) -> list[tuple[int, float]]:
        scores = self.passed(text).logits[0, -1].float().log_softmax(-1)
        followed = set().union(*self.tried.get(len(text), [set()]))
        scores[list(followed)] = -torch.inf
        best = scores.topk(self.method.n_candidates)
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def penalty(self, text: list[int]) -> tuple[float, int]:
        weights = self.passed(text).attentions[-1].amax(dim=1)
        start = self.prompt.shape[1]
        found = F.opera_penalty(
            weights[:, None],
            torch.zeros(1, weights.shape[-1], dtype=torch.bool),
            scale=self.method.scale,
            response_start=start,
            bonus_length=0,
        )
        return float(found.penalty), int(found.anchor)

    def passed(self, text: list[int]) -> Any:
        if tuple(text) not in self.known:
            ids = torch.cat([self.prompt, torch.tensor([text], dtype=torch.long)], dim=1)
            whole = {**self.row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                self.known[tuple(text)] = self.family.model(**whole, output_attentions=True)
        return self.known[tuple(text)]

    def place(self, beams: list[Any], anchors: list[int], length: int) -> int | None:
        if self.method.rollbacks == 0:
            return None
        place = mode(anchors)
        times = [b[2].count(place) + (a == place) for b, a in zip(beams, anchors, strict=True)]
        if min(times) <= self.method.threshold:
            return None
        for kept in (place + 1, place):
            if 1 <= kept < length and len(self.tried.get(kept, [])) < self.method.rollbacks:
                return kept
        return None


def mode(values: list[int]) -> int:
    return int(torch.tensor(values).mode().values)


@pytest.mark.parametrize("options", [STRONG | {"rollbacks": 0}, RESTLESS], ids=["penalty", "back"])
def test_it_is_the_plain_search_of_each_prompt_by_itself(family, batch, options) -> None:
    method, eager = OPERA(**options), zoo.load("llava", attn_implementation="eager")
    texts = generated(family, batch, method)[:, -N_NEW:]
    for row, (n_text, seed) in enumerate(((5, 0), (9, 1))):
        alone = family.batch([family.inputs(n_text=n_text, seed=seed)])
        plain = Plain(eager, alone, method)
        assert texts[row].tolist() == plain.run()
        assert bool(plain.tried) == (method.rollbacks > 0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_what_is_taken_back_leaves_no_trace_in_the_cache_beside_contrasts(name) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    spec = [OPERA(**RESTLESS), {"method": "vcd", "alpha": 0.5, "noise_step": 400}]
    options = {"max_new_tokens": N_NEW, "do_sample": False}
    with vlm_steer.steer(family.model, spec) as steering:
        paired = family.model.generate(**batch, **options)
        assert steering.effect()["opera"]["choices_changed"] > 0
        uncached = family.model.generate(**batch, **options, use_cache=False)
    with vlm_steer.steer(family.model, spec, backend="separate"):
        separate = family.model.generate(**batch, **options)
    assert torch.equal(paired, uncached)
    assert torch.equal(separate, uncached)


def test_rows_of_a_batch_wait_for_each_other_and_keep_their_texts(family) -> None:
    rows = [family.inputs(n_text=4 + i, seed=i) for i in range(4)]
    together = generated(family, family.batch(rows), OPERA(**RESTLESS), max_new_tokens=10)
    for index, row in enumerate(rows):
        alone = generated(family, family.batch([row]), OPERA(**RESTLESS), max_new_tokens=10)
        assert torch.equal(together[index, -10:], alone[0, -10:])


def test_the_logits_returned_are_those_of_the_text_returned(family, batch) -> None:
    output = generated(
        family, batch, OPERA(**RESTLESS), return_dict_in_generate=True, output_logits=True
    )
    ids = output.sequences
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, N_NEW), value=1)
    with torch.no_grad():
        whole = family.model(**{**batch, "input_ids": ids, "attention_mask": mask}).logits
    torch.testing.assert_close(
        torch.stack(output.logits, dim=1), whole[:, -N_NEW - 1 : -1], rtol=1e-4, atol=1e-4
    )


def test_observers_are_traced_through_beams_and_what_was_taken_back(family, batch) -> None:
    with vlm_steer.steer(family.model, [OPERA(**RESTLESS), "lookback_ratio"]) as steering:
        ids = family.model.generate(**batch, max_new_tokens=N_NEW, do_sample=False)
        ratios = steering.records(ids)["lookback_ratio"]

    def forced(so_far: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, ids[:, so_far.shape[1]][:, None], 0.0)

    with vlm_steer.steer(family.model, "lookback_ratio") as steering:
        again = family.model.generate(
            **batch, max_new_tokens=N_NEW, do_sample=False, logits_processor=[forced]
        )
        expected = steering.records(again)["lookback_ratio"]
    torch.testing.assert_close(ratios, expected, rtol=1e-4, atol=1e-5)


def test_an_end_token_ends_a_text_and_shorter_ones_are_padded(family, batch) -> None:
    method = OPERA(**STRONG, rollbacks=0)
    free = generated(family, batch, method)[:, -N_NEW:]
    end = int(free[0, 2])
    output = generated(
        family,
        batch,
        method,
        eos_token_id=[end, 1],
        pad_token_id=0,
        num_return_sequences=2,
        return_dict_in_generate=True,
    )
    texts = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
    assert len(texts) == 4
    assert any(end in text for text in texts[:2])
    for text in texts:
        if end in text:
            assert set(text[text.index(end) + 1 :]) <= {0}
    scores = output.sequences_scores.view(2, 2)
    assert (scores[:, 0] >= scores[:, 1]).all()


def test_num_beams_of_generate_holds_where_it_is_asked_for(family, batch) -> None:
    one = generated(family, batch, OPERA(**STRONG | {"beams": 3}, rollbacks=0))
    other = generated(family, batch, OPERA(**STRONG, rollbacks=0), num_beams=3)
    assert torch.equal(one, other)


def test_the_image_bonus_of_the_official_code_changes_the_first_tokens(family, batch) -> None:
    paper = generated(family, batch, OPERA(**STRONG, rollbacks=0))
    official = generated(family, batch, OPERA(**STRONG, rollbacks=0, bonus_length=10))
    assert not torch.equal(paper, official)


def test_what_it_cannot_follow_is_refused_by_name(family, batch) -> None:
    for options, word in (
        ({"do_sample": True}, "do_sample"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences"),
    ):
        with pytest.raises(ConfigError, match=word):
            generated(family, batch, OPERA(), **options)
    with pytest.raises(UnsupportedModelError, match="streamer"):
        generated(family, batch, OPERA(), streamer=object())
    with pytest.raises(UnsupportedModelError, match="cache_implementation"):
        generated(family, batch, OPERA(), cache_implementation="static")
    with pytest.raises(ConfigError, match="reads one layer"):
        vlm_steer.attach(family.model, OPERA(layers="all"))
    with pytest.raises(UnsupportedModelError, match="cannot forget"):
        vlm_steer.attach(zoo.load("gemma3").model, OPERA())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"beams": 0}, "beams"),
        ({"n_candidates": 1}, "n_candidates"),
        ({"weight": -1.0}, "weight"),
        ({"scale": 0.0}, "scale"),
        ({"threshold": 0}, "threshold"),
        ({"rollbacks": -1}, "rollbacks"),
        ({"bonus_length": -1}, "bonus_length"),
        ({"window": 1}, "window"),
        ({"rollbacks": 0, "threshold": 3}, "threshold"),
        ({"scope": "all"}, "scope"),
    ],
)
def test_options_outside_their_range_or_without_effect_are_refused(options, word) -> None:
    with pytest.raises(ConfigError, match=word):
        OPERA(**options)
