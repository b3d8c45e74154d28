"""Questions about one image that share its pass."""

import pytest
import torch

import vlm_steer
from tests.contract.settings import ACTIVE
from tests.families import zoo
from vlm_steer.engine import hooks, plan
from vlm_steer.engine.caches import take_rows
from vlm_steer.errors import SteerError
from vlm_steer.generation import encode, render_prompt
from vlm_steer.tiny.scenes import image

QUESTIONS = ["Is there a car?", "Describe the image.", "Is there a traffic light in the image?"]


@pytest.fixture(scope="module")
def tiny():
    return vlm_steer.load_tiny()


def _prompts(tiny, pictures):
    """Whole prompts for every picture and question, padded on the left."""
    processor = tiny[1]
    prompts = [render_prompt(processor, q) for _ in pictures for q in QUESTIONS]
    images = [picture for picture in pictures for _ in QUESTIONS]
    return encode(processor, prompts, images)


def _forked(tiny, steering, pictures, whole, **options):
    """The same answers, the prompts up to the image computed once per picture."""
    model = tiny[0]
    every = len(QUESTIONS)
    image_id = model.config.image_token_id
    rows = [
        ids[mask.bool()]
        for ids, mask in zip(whole["input_ids"], whole["attention_mask"], strict=True)
    ]
    cut = [int((row == image_id).nonzero().max()) + 1 for row in rows]
    prefixes = torch.stack([row[:n] for row, n in zip(rows, cut, strict=True)])[::every]
    cache = steering.prefill(
        input_ids=prefixes,
        attention_mask=torch.ones_like(prefixes),
        pixel_values=whole["pixel_values"][::every],
    )
    steering.fork(cache, torch.arange(len(pictures)).repeat_interleave(every))
    tails = [row[n:] for row, n in zip(rows, cut, strict=True)]
    longest = max(map(len, tails))
    pad = [torch.nn.functional.pad(tail, (longest - len(tail), 0)) for tail in tails]
    real = [torch.nn.functional.pad(torch.ones_like(t), (longest - len(t), 0)) for t in tails]
    start = prefixes.repeat_interleave(every, dim=0)
    return model.generate(
        input_ids=torch.cat([start, torch.stack(pad)], dim=1),
        attention_mask=torch.cat([torch.ones_like(start), torch.stack(real)], dim=1),
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


SHARED = {
    "none": None,
    "var": ACTIVE["var"],
    "var and dola": [ACTIVE["var"], {"method": "dola"}],
    "spin": ACTIVE.get("spin", "spin"),
    "pai without its branch": {"method": "pai", "gamma": 1.0},
}


@pytest.mark.parametrize("n_pictures", [1, 2])
@pytest.mark.parametrize("name", SHARED)
def test_a_shared_pass_gives_the_answers_of_whole_prompts(tiny, name, n_pictures):
    pictures = [image("iid", 100_000 + index) for index in range(n_pictures)]
    whole = _prompts(tiny, pictures)
    model, processor = tiny
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    with vlm_steer.steer(model, SHARED[name], processor=processor) as steering:
        plain = model.generate(**whole, **options, return_dict_in_generate=True, output_logits=True)
        effect = steering.effect()
        forked = _forked(tiny, steering, pictures, whole, **options)
        assert all(
            seen["probability_moved"] or any(touch["rows"] for touch in seen["layers"].values())
            for seen in effect.values()
        )
        assert steering.effect().keys() == effect.keys()
    new = [out.sequences[:, -6:] for out in (plain, forked)]
    assert torch.equal(*new)
    assert torch.allclose(torch.stack(plain.logits), torch.stack(forked.logits), atol=1e-4)


@pytest.mark.parametrize("spec", ["vcd", "vhr", "mma", [ACTIVE["var"], {"method": "spin"}]])
def test_methods_that_need_the_whole_prompt_refuse(tiny, spec):
    model, processor = tiny
    with vlm_steer.steer(model, spec, processor=processor) as steering:
        assert steering.plan.prefix is None
        with pytest.raises(SteerError, match="pass of its own"):
            steering.prefill(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("n", [1, 2])
def test_rows_that_a_cache_does_not_have_are_refused_before_it_changes(tiny, n):
    model, processor = tiny
    prefix = encode(processor, [render_prompt(processor, "?")] * n, [image("iid", 100_000)] * n)
    with vlm_steer.steer(model, None) as steering:
        cache = steering.prefill(**prefix)
        before = cache.layers[0].keys
        for rows in ([0, n], [-1, 0]):
            with pytest.raises(SteerError, match=rf"fork\(\): rows .* the cache has {n}"):
                steering.fork(cache, torch.tensor(rows))
        assert cache.layers[0].keys is before


def test_an_image_that_sees_the_question_is_in_no_shared_pass():
    family = zoo.load("paligemma")
    with (
        vlm_steer.steer(family.model, None) as steering,
        pytest.raises(SteerError, match="may depend on the question"),
    ):
        steering.prefill(**family.inputs())


def test_layers_without_attention_take_rows_too():
    family = zoo.load("qwen3_5")
    prompt, rows = family.batch([family.inputs(6), family.inputs(6, seed=1)]), [1, 0, 1]
    with torch.no_grad():
        cache = family.model(**prompt, use_cache=True).past_key_values
        before = [layer.conv_states[0].clone() for layer in cache.layers[::2]]
        take_rows(cache, torch.tensor(rows))
    for layer, states in zip(cache.layers[::2], before, strict=True):
        assert torch.equal(layer.conv_states[0], states[rows])
    assert all(len(layer.keys) == len(rows) for layer in cache.layers[1::2])


def test_every_hook_of_a_layer_is_known_to_act_on_late_rows_or_on_the_prompt():
    """A new hook must be put on one of the lists, or sharing would overlook it."""
    known = {*plan._ROW_HOOKS, *plan._PROMPT_HOOKS, "marks", "observe"}
    assert set(hooks.LAYER_HOOKS) <= known
