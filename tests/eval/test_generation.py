"""Generation whose results depend on the item alone."""

import pytest
import torch

from vlm_steer.errors import ConfigError, SteerError
from vlm_steer.generation import render_prompt
from vlm_steer.tiny.scenes import image
from vlm_steer_eval.running.generation import Generator, Settings, item_seed
from vlm_steer_eval.running.sampling import LIMIT, FirstTokenMargin, SeededNoise

WORDS = (("yes", "Yes"), ("no", "No"))
PICTURES = [image("iid", 100_000 + index) for index in range(3)]
QUESTIONS = ["Is there a car in the image?", "Is there a bus?", "Is there a dog in this picture?"]


def _run(tiny, settings, order, words=None):
    generator = Generator(*tiny, settings, words)
    prompts = [render_prompt(tiny[1], QUESTIONS[i]) for i in order]
    outputs = generator(prompts, [PICTURES[i] for i in order], [str(i) for i in order])
    return dict(zip(order, outputs, strict=True))


def test_noise_samples_from_the_distribution_of_the_scores():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    noisy = SeededNoise(range(4000))(torch.zeros(4000, 1), scores)
    shares = torch.bincount(noisy.argmax(-1), minlength=4) / 4000
    # Standard error of a share of 4000 draws is below 0.008.
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)


def test_a_rows_noise_does_not_depend_on_its_neighbours():
    scores = torch.randn(2, 7)
    together = SeededNoise([3, 4])(torch.zeros(2, 1), scores)
    alone = SeededNoise([4])(torch.zeros(1, 1), scores[1:])
    assert torch.equal(together[1:], alone)


def test_sampled_answers_do_not_depend_on_order_or_batch(tiny):
    settings = Settings(max_new_tokens=8, temperature=3.0, top_p=0.95, seed=11)
    together = _run(tiny, settings, [0, 1, 2])
    shuffled = _run(tiny, settings, [2, 0, 1])
    alone = {i: _run(tiny, settings, [i])[i] for i in range(3)}
    for i in range(3):
        assert together[i].text == shuffled[i].text == alone[i].text
    other = _run(tiny, Settings(max_new_tokens=8, temperature=3.0, seed=12), [0, 1, 2])
    assert any(other[i].text != together[i].text for i in range(3))


def test_item_seeds_differ_by_run_and_item_and_are_stable():
    assert item_seed(0, "a") == item_seed(0, "a")
    assert len({item_seed(0, "a"), item_seed(1, "a"), item_seed(0, "b")}) == 3
    assert 0 <= item_seed(5, "x") < 2**63


def test_greedy_answers_equal_the_models_own_and_are_flagged_when_cut(tiny):
    model, processor = tiny
    output = _run(tiny, Settings(max_new_tokens=2), [0])[0]
    prompt = render_prompt(processor, QUESTIONS[0])
    inputs = processor(images=[PICTURES[0]], text=[prompt], return_tensors="pt")
    sequence = model.generate(**inputs, do_sample=False, max_new_tokens=2)[0]
    new = sequence[inputs["input_ids"].shape[1] :]
    assert output.text == processor.decode(new, skip_special_tokens=True).strip()
    ended = model.generation_config.eos_token_id in new.tolist()
    assert output.truncated == (not ended)
    assert output.n_tokens == len(new)


def test_layout_hash_tells_prompts_apart_and_ignores_padding(tiny):
    settings = Settings(max_new_tokens=1)
    together = _run(tiny, settings, [0, 1])
    assert together[1].layout == _run(tiny, settings, [1])[1].layout
    assert together[0].layout != together[1].layout


def test_margin_is_the_log_odds_of_the_first_token(tiny):
    model, processor = tiny
    output = _run(tiny, Settings(max_new_tokens=1), [0], WORDS)[0]
    prompt = render_prompt(processor, QUESTIONS[0])
    inputs = processor(images=[PICTURES[0]], text=[prompt], return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1].float()

    def log_p(words):
        forms = [form for word in words for form in (word, f" {word}")]
        first = {processor.tokenizer(f, add_special_tokens=False)["input_ids"][0] for f in forms}
        return logits.log_softmax(-1)[sorted(first)].logsumexp(-1)

    assert output.margin == pytest.approx(float(log_p(WORDS[0]) - log_p(WORDS[1])), abs=1e-4)


def test_margins_stay_finite_where_a_side_has_no_probability():
    infinity = float("inf")
    scores = torch.tensor([[0.0, -infinity], [-infinity, 0.0], [-infinity, -infinity]])
    margin = FirstTokenMargin(torch.tensor([0]), torch.tensor([1]))
    assert margin.values(2) == [None, None]
    assert margin(torch.zeros(3, 1), scores) is scores
    assert margin.values(3) == [LIMIT, -LIMIT, None]


def test_words_that_share_their_first_token_are_refused(tiny):
    with pytest.raises(SteerError, match="same first token"):
        Generator(*tiny, Settings(), (["yes"], ["yes"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"num_beams": 0}, "--num-beams"),
        ({"temperature": -1.0}, "--temperature"),
        ({"top_p": 0.0, "temperature": 1.0}, "--top-p"),
        ({"top_p": 0.5}, "no effect without sampling"),
        ({"temperature": 1.0, "num_beams": 2}, "cannot be combined"),
    ],
)
def test_contradictory_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**options)


def test_the_seed_is_part_of_the_settings_only_where_it_acts():
    assert "seed" not in Settings().as_dict()
    assert Settings(temperature=0.7, seed=3).as_dict()["seed"] == 3
