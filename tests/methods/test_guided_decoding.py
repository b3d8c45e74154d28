"""Guided decoding: which candidate wins, what ends a text, and what generate() keeps doing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import vlm_steer
from tests.contract.test_contract import two_rows
from tests.families import zoo
from vlm_steer.detection import FittedDetector, Logistic, Unit, made_for, trace_answers
from vlm_steer.detection.detectors.attention import LookbackRatio
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import CompositionError, ConfigError, DataError, UnsupportedModelError
from vlm_steer.generation import encode, render_prompt
from vlm_steer.methods.guided_decoding import GuidedDecoding
from vlm_steer.tiny import CAPTION_PROMPT, scenes

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

SAMPLED = {"do_sample": True, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def family() -> zoo.Family:
    return zoo.load("llava")


@pytest.fixture(scope="module")
def batch(family: zoo.Family) -> dict[str, Tensor]:
    return two_rows(family)


def new_tokens(family: zoo.Family, batch: dict[str, Tensor], **options: Any) -> Tensor:
    return family.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def mean_log_probability(family: zoo.Family, ids: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean log-probability of the generated part, from one pass without any cache."""
    mask = torch.nn.functional.pad(
        batch["attention_mask"], (0, ids.shape[1] - batch["input_ids"].shape[1]), value=1
    )
    whole = {**batch, "input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        logits = family.model(**whole).logits[:, batch["input_ids"].shape[1] - 1 : -1]
    chosen = ids[:, batch["input_ids"].shape[1] :, None]
    return logits.log_softmax(dim=-1).gather(-1, chosen).squeeze(-1).mean(dim=1)


def test_one_chunk_is_the_likeliest_of_the_candidates_that_plain_sampling_draws(family) -> None:
    batch = family.batch([family.inputs(n_text=7)])
    torch.manual_seed(3)
    drawn = family.model.generate(**batch, **SAMPLED, top_k=0, num_return_sequences=4)
    scores = torch.cat([mean_log_probability(family, row[None], batch) for row in drawn])
    torch.manual_seed(3)
    with vlm_steer.steer(
        family.model, GuidedDecoding(detector="log_probability", n_candidates=4, chunk_size=6)
    ) as steering:
        guided = family.model.generate(**batch, **SAMPLED, top_k=0)
    assert torch.equal(guided[0], drawn[scores.argmax()])
    assert steering.effect()["guided_decoding"]["choices_changed"] == int(scores.argmax() > 0)


def test_later_chunks_go_on_from_the_winner_and_not_from_the_candidate_in_its_row(
    family, batch
) -> None:
    method = GuidedDecoding(detector="log_probability", n_candidates=4, chunk_size=2)
    with vlm_steer.steer(family.model, method):
        cached = family.model.generate(
            **batch, max_new_tokens=6, return_dict_in_generate=True, output_logits=True
        )
    for row in range(2):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        ids = cached.sequences[row : row + 1]
        whole = {**alone, "input_ids": ids}
        whole["attention_mask"] = torch.nn.functional.pad(alone["attention_mask"], (0, 6), value=1)
        with torch.no_grad():
            expected = family.model(**whole).logits[0, -7:-1]
        torch.testing.assert_close(
            torch.stack([step[row] for step in cached.logits]), expected, rtol=1e-4, atol=1e-4
        )


def test_the_users_temperature_and_nucleus_are_honoured(family, batch) -> None:
    greedy = new_tokens(family, batch, do_sample=False, max_new_tokens=6)
    with vlm_steer.steer(family.model, GuidedDecoding(n_candidates=3, chunk_size=2)):
        cold = new_tokens(family, batch, **SAMPLED, temperature=1e-4)
        narrow = new_tokens(family, batch, **SAMPLED, top_p=1e-6)
        hot = new_tokens(family, batch, **SAMPLED, temperature=5.0)
    assert torch.equal(cold, greedy)
    assert torch.equal(narrow, greedy)
    assert not torch.equal(hot, greedy)


def test_without_sampling_the_text_depends_on_the_prompt_and_the_seed_alone(family, batch) -> None:
    def text(seed: int) -> Tensor:
        torch.rand(7)
        method = GuidedDecoding(n_candidates=3, chunk_size=2, seed=seed, temperature=2.0)
        with vlm_steer.steer(family.model, method):
            return new_tokens(family, batch, max_new_tokens=6)

    assert torch.equal(text(0), text(0))
    assert not torch.equal(text(0), text(1))


def test_several_sequences_per_prompt_are_searched_apart(family, batch) -> None:
    with vlm_steer.steer(family.model, GuidedDecoding(n_candidates=3, chunk_size=2)):
        tokens = new_tokens(family, batch, **SAMPLED, num_return_sequences=2, temperature=3.0)
    assert tokens.shape == (4, 6)
    assert not torch.equal(tokens[0], tokens[1])


def test_a_text_that_ends_is_padded_and_the_others_go_on(family, batch) -> None:
    method = GuidedDecoding(n_candidates=3, chunk_size=2)
    with vlm_steer.steer(family.model, method):
        free = new_tokens(family, batch, max_new_tokens=6)
        end = int(free[0, 1])
        assert end not in free[1].tolist(), "the seed no longer fits this test"
        ended = new_tokens(family, batch, max_new_tokens=6, eos_token_id=[end, 1], pad_token_id=0)
    assert ended[0].tolist()[2:] == [0] * (ended.shape[1] - 2) or end not in ended[0].tolist()
    assert ended.shape[1] == 6
    for row in ended.tolist():
        if end in row:
            assert set(row[row.index(end) + 1 :]) <= {0}


def test_stopping_criteria_processors_and_length_limits_hold(family, batch) -> None:
    banned = new_tokens(family, batch, max_new_tokens=6)[0, 0]

    def without(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, banned[None], -torch.inf)

    def after_four(ids: Tensor, scores: Any, **options: Any) -> Tensor:
        is_over = ids.shape[1] >= batch["input_ids"].shape[1] + 4
        return torch.full((ids.shape[0],), is_over, dtype=torch.bool)

    with vlm_steer.steer(family.model, GuidedDecoding(n_candidates=3, chunk_size=3)):
        tokens = new_tokens(family, batch, max_new_tokens=5, logits_processor=[without])
        stopped = new_tokens(family, batch, max_new_tokens=6, stopping_criteria=[after_four])
        configured = new_tokens(family, batch, generation_config=GenerationConfig(max_new_tokens=4))
    assert tokens.shape == (2, 5)
    assert int(banned) not in tokens.flatten().tolist()
    assert stopped.shape == configured.shape == (2, 4)


def test_stop_strings_end_a_text() -> None:
    model, processor = vlm_steer.load_tiny()
    image = scenes.render(scenes.scene("iid", 0))
    inputs = encode(processor, [render_prompt(processor, "What is here?")], [image])
    length = inputs["input_ids"].shape[1]
    with vlm_steer.steer(model, GuidedDecoding(n_candidates=2, chunk_size=4)):
        free = model.generate(**inputs, max_new_tokens=12)[0, length:]
        word = processor.tokenizer.decode(free[1:2]).strip()
        stopped = model.generate(
            **inputs, max_new_tokens=12, stop_strings=[word], tokenizer=processor.tokenizer
        )[0, length:]
    assert stopped.tolist() == free[:2].tolist()


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.has_ended = True


def test_a_streamer_hears_the_prompt_and_then_the_text_token_by_token(family) -> None:
    batch, heard = family.batch([family.inputs()]), Heard()
    with vlm_steer.steer(family.model, GuidedDecoding(n_candidates=3, chunk_size=2)):
        ids = family.model.generate(**batch, max_new_tokens=5, streamer=heard)
    assert heard.has_ended
    assert torch.equal(heard.pieces[0], batch["input_ids"])
    assert torch.equal(torch.cat(heard.pieces[1:]), ids[0, batch["input_ids"].shape[1] :])


def test_observers_follow_the_rows_that_won(family, batch) -> None:
    spec = [GuidedDecoding(n_candidates=3, chunk_size=2), "lookback_ratio"]
    with vlm_steer.steer(family.model, spec) as steering:
        ids = family.model.generate(**batch, max_new_tokens=6)
        ratios = steering.records(ids)["lookback_ratio"]
    assert ratios.shape[:2] == (2, 6)
    # The same text, generated without a choice: every token is the only one left.
    length = batch["input_ids"].shape[1]

    def forced(so_far: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, ids[:, so_far.shape[1]][:, None], 0.0)

    with vlm_steer.steer(family.model, "lookback_ratio") as steering:
        again = family.model.generate(
            **batch, max_new_tokens=6, do_sample=False, logits_processor=[forced]
        )
        expected = steering.records(again)["lookback_ratio"]
    assert torch.equal(again[:, length:], ids[:, length:])
    torch.testing.assert_close(ratios, expected, rtol=1e-4, atol=1e-5)


def test_what_a_search_cannot_do_is_refused_by_name(family, batch) -> None:
    with vlm_steer.steer(family.model, GuidedDecoding()):
        with pytest.raises(ConfigError, match="num_beams is 3"):
            family.model.generate(**batch, num_beams=3, max_new_tokens=2)
        for option in ("output_attentions", "output_hidden_states"):
            with pytest.raises(UnsupportedModelError, match=option):
                family.model.generate(**batch, max_new_tokens=2, **{option: True})
        with pytest.raises(UnsupportedModelError, match="custom_generate"):
            family.model.generate(**batch, max_new_tokens=2, custom_generate=lambda: None)
        with torch.no_grad():
            cache = family.model(**batch, use_cache=True).past_key_values
        with pytest.raises(UnsupportedModelError, match="cannot continue a cache"):
            family.model.generate(**batch, max_new_tokens=2, past_key_values=cache)


def test_two_searches_are_refused_when_they_are_attached(family) -> None:
    class Other(GuidedDecoding):
        name = "other"

    with pytest.raises(CompositionError, match="guided_decoding and other"):
        vlm_steer.attach(family.model, [GuidedDecoding(), Other()])
    assert "generate" not in vars(family.model)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"n_candidates": 0}, "n_candidates"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"detector": "log_probability", "layers": [0, 1]}, "layers"),
        ({"scope": "all"}, "scope"),
    ],
)
def test_options_outside_their_range_or_without_effect_are_refused(options, word) -> None:
    with pytest.raises(ConfigError, match=word):
        GuidedDecoding(**options)


@pytest.fixture(scope="module")
def captioning() -> tuple[Any, Any, dict[str, Tensor]]:
    model, processor = vlm_steer.load_tiny()
    image = scenes.render(scenes.scene("broken", 0))
    return model, processor, encode(processor, [render_prompt(processor, CAPTION_PROMPT)], [image])


def some_detector(model: Any, processor: Any, **options: Any) -> FittedDetector:
    """A detector of lookback ratios with made-up weights of both signs."""
    detector = LookbackRatio(**options)
    info = inspect_model(model)
    size = len(detector.parts) * info.n_layers * int(info.text_config.num_attention_heads)
    coef = torch.randn(size, generator=torch.Generator().manual_seed(0)).double()
    intercept = torch.zeros((), dtype=torch.float64)
    weights = Logistic(coef=coef, intercept=intercept, mean=0.5 + 0 * coef, scale=0.1 + 0 * coef)
    return FittedDetector(detector, weights, made_for=made_for(model, processor))


@pytest.mark.parametrize("parts", [("context",), ("system", "image", "instruction")])
def test_a_fitted_detector_chooses_the_candidate_to_which_it_gives_the_least_risk(
    captioning, tmp_path, parts
) -> None:
    model, processor, inputs = captioning
    fitted = some_detector(model, processor, parts=parts)
    fitted.save_pretrained(tmp_path)
    sampling = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6, "min_new_tokens": 6}
    torch.manual_seed(5)
    drawn = model.generate(**inputs, **sampling, top_k=0, num_return_sequences=4)
    risks = []
    for row in drawn:
        answer = row[inputs["input_ids"].shape[1] :]
        (trace,) = trace_answers(model, processor, inputs, [answer])
        risks.append(float(fitted.risk(trace, [Unit((0, 6), (0, 1))])))
    torch.manual_seed(5)
    method = GuidedDecoding(detector=str(tmp_path), n_candidates=4, chunk_size=6)
    with vlm_steer.steer(model, method):
        guided = model.generate(**inputs, **sampling, top_k=0)
    assert len(set(risks)) > 1
    assert torch.equal(guided[0], drawn[risks.index(min(risks))])


def test_a_detector_of_another_model_or_of_something_else_is_refused(
    captioning, family, tmp_path
) -> None:
    model, processor, _ = captioning
    some_detector(model, processor).save_pretrained(tmp_path / "tiny")
    some_detector(model, processor, pool="first").save_pretrained(tmp_path / "first")
    with pytest.raises(ConfigError, match="another model: layers 6 instead of 4"):
        vlm_steer.attach(family.model, GuidedDecoding(detector=str(tmp_path / "tiny")))
    with pytest.raises(ConfigError, match="pool: mean"):
        vlm_steer.attach(model, GuidedDecoding(detector=str(tmp_path / "first")))
    with pytest.raises(DataError, match=r"holds no detector\.json"):
        vlm_steer.attach(model, GuidedDecoding(detector=str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match="layers"):
        GuidedDecoding(detector=str(tmp_path / "tiny"), layers=(0, 1))
