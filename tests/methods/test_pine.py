"""PINE: the same answer in any order, and the attention that the equations spell out."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import assert_close, generate
from tests.families import zoo
from vlm_steer.errors import ConfigError, SteerWarning, UnsupportedModelError

SEPARATOR = 99
SPANS = ((-12, -10), (-10, -7), (-7, -3))


@pytest.fixture
def family() -> zoo.Family:
    return zoo.load("llava")


def pictures(family: zoo.Family, order: tuple[int, ...], n_text: int = 5) -> dict[str, Tensor]:
    """A prompt with images in an order, each followed by the same separator."""
    rows = [family.inputs(seed=seed) for seed in order]
    image = [family.image_token_id] * 16
    ids = [1, 20, 21, *[token for _ in order for token in [*image, SEPARATOR]]]
    ids = torch.tensor([[*ids, *range(40, 40 + n_text)]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
    }


def options(family: zoo.Family, order: tuple[int, ...]) -> dict[str, Tensor]:
    """A prompt whose last tokens are spans of 2, 3 and 4 tokens in an order, then a suffix."""
    spans = [[50, 51], [60, 61, 62], [70, 71, 72, 73]]
    batch = family.batch([family.inputs(n_text=4)])
    tail = torch.tensor([[token for i in order for token in spans[i]] + [80, 81, 82]])
    batch["input_ids"] = torch.cat([batch["input_ids"], tail], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def of_spans(order: tuple[int, ...]) -> dict[str, Any]:
    lengths = [(2, 3, 4)[i] for i in order]
    stops = list(itertools.accumulate(lengths, initial=-12))
    return {"method": "pine", "segments": list(itertools.pairwise(stops))}


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_the_order_of_spans_does_not_matter(family: zoo.Family, order: tuple[int, ...]) -> None:
    first = (0, 1, 2)
    with vlm_steer.steer(family.model, of_spans(first)):
        expected = generate(family, options(family, first))
    with vlm_steer.steer(family.model, of_spans(order)):
        assert_close(generate(family, options(family, order)), expected)
    base = generate(family, options(family, first))
    assert not torch.allclose(generate(family, options(family, order)), base, atol=1e-2)
    assert not torch.allclose(expected, base, atol=1e-2)


@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1)])
def test_the_order_of_images_does_not_matter(family: zoo.Family, order: tuple[int, ...]) -> None:
    straight = tuple(sorted(order))
    with vlm_steer.steer(family.model, "pine"):
        expected = generate(family, pictures(family, straight))
        assert_close(generate(family, pictures(family, order)), expected)
    base = generate(family, pictures(family, straight))
    assert not torch.allclose(generate(family, pictures(family, order)), base, atol=1e-2)


def test_rows_with_other_numbers_of_images_do_not_meet(family: zoo.Family) -> None:
    rows = [pictures(family, (0, 1, 2)), pictures(family, (3, 4), n_text=9), family.inputs(seed=5)]
    together = family.batch(rows)
    with vlm_steer.steer(family.model, "pine"):
        logits = generate(family, together)
        assert_close(logits, generate(family, together, use_cache=False))
        for index, row in enumerate(rows):
            assert_close(logits[index : index + 1], generate(family, row))
    base = generate(family, family.batch([rows[2]]))
    assert_close(logits[2:], base)


def dense(family: zoo.Family, batch: dict[str, Tensor], spans: tuple[tuple[int, int], ...]) -> Any:
    """Head outputs of the first layer, with keys turned for every head, row and segment."""
    decoder = family.model.get_decoder()
    attention = decoder.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda m, a, out, name=name: seen.setdefault(name, out)
        )
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad():
        family.model(**batch)
    for hook in hooks:
        hook.remove()
    size = batch["input_ids"].shape[1]
    q, k, v = (
        seen[name].view(size, -1, 8).transpose(0, 1) for name in ("q_proj", "k_proj", "v_proj")
    )
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    spans = tuple((size + start, size + stop) for start, stop in spans)
    end = spans[-1][1]
    owner = [next((n for n, (a, b) in enumerate(spans) if a <= t < b), None) for t in range(size)]
    place = [t if owner[t] is None else end - spans[owner[t]][1] + t for t in range(size)]
    outputs = torch.zeros(4, size, 8)
    for head in range(4):
        plain = q[head] @ k[head].T * 8**-0.5
        of_row: dict[int, Tensor] = {}
        for t in range(size):
            columns = [c for c in range(size) if owner[c] is not None and owner[c] != owner[t]]
            weights = torch.zeros(size)
            weights[columns] = plain[t, columns].softmax(-1)
            of_row[t] = torch.stack([weights[a:b].mean() for a, b in spans])
        for t in range(size):
            importance = of_row[t]
            if owner[t] is not None:
                importance = sum(of_row[u] for u in range(size) if owner[u] == owner[t])
                importance[owner[t]] = torch.inf
            ranking = importance.argsort(descending=True, stable=True).tolist()
            moved = {}
            for n, segment in enumerate(ranking):
                moved[segment] = sum(spans[s][1] - spans[s][0] for s in ranking[:n])
            scores = torch.full((size,), -torch.inf)
            for c in range(size):
                # Before the segments nothing changes; a row reads a segment where it ranks it.
                reads = owner[c] is not None and t >= spans[0][0]
                there = place[c] - (moved[owner[c]] if reads else 0)
                if (there <= place[t]) if reads else (c <= t):
                    scores[c] = turned(decoder, q[head, t], place[t]) @ turned(
                        decoder, k[head, c], there
                    )
            outputs[head, t] = (scores * 8**-0.5).softmax(-1) @ v[head]
    return outputs


def turned(decoder: Any, state: Tensor, position: int) -> Tensor:
    cosines, sines = decoder.rotary_emb(state[None, None], torch.tensor([[position]]))
    half = torch.cat([-state[4:], state[:4]])
    return state * cosines[0, 0] + half * sines[0, 0]


def test_the_first_layer_attends_as_the_equations_say(family: zoo.Family) -> None:
    batch = options(family, (0, 1, 2))
    expected = dense(family, batch, SPANS)
    seen = {}

    def note(module: Any, args: Any) -> None:
        seen["outputs"] = args[0]

    projection = family.model.get_decoder().layers[0].self_attn.o_proj
    hook = projection.register_forward_pre_hook(note)
    with vlm_steer.steer(family.model, of_spans((0, 1, 2))), torch.no_grad():
        family.model(**batch)
    hook.remove()
    actual = seen["outputs"][0].view(-1, 4, 8).transpose(0, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_one_image_has_no_order_and_warns(family: zoo.Family) -> None:
    batch = family.batch([family.inputs()])
    base = generate(family, batch)
    with (
        pytest.warns(SteerWarning, match="pine changed nothing"),
        vlm_steer.steer(family.model, "pine"),
    ):
        assert_close(generate(family, batch), base)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("qwen2_5_vl", "pine", "several axes"),
        ("gemma3", "pine", "window"),
        ("aya_vision", "pine", "window"),
        ("paligemma", "pine", "both directions"),
        ("blip-2", "pine", "no rotary"),
        ("minicpmv4_6", "pine", "without attention"),
        ("idefics3", "pine", "no unbroken runs"),
        ("mistral3", "pine", "no unbroken runs"),
        ("mllama", "pine", "no unbroken runs"),
    ],
)
def test_models_whose_order_cannot_be_hidden_are_refused(name: str, spec: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        vlm_steer.attach(zoo.load(name).model, spec)


def test_a_new_image_behind_a_cache_is_refused(family: zoo.Family) -> None:
    batch = pictures(family, (0, 1))
    with vlm_steer.steer(family.model, "pine"), torch.no_grad():
        output = family.model(**batch, use_cache=True)
        more = pictures(family, (2,))
        with pytest.raises(UnsupportedModelError, match="in the cache already"):
            family.model(
                input_ids=more["input_ids"],
                pixel_values=more["pixel_values"],
                past_key_values=output.past_key_values,
            )


def test_a_second_question_behind_a_cache_keeps_the_images_without_order(
    family: zoo.Family,
) -> None:
    with vlm_steer.steer(family.model, "pine"), torch.no_grad():
        results = []
        for order in ((0, 1), (1, 0)):
            cache = family.model(**pictures(family, order), use_cache=True).past_key_values
            more = torch.tensor([[30, 31, 32]])
            results.append(family.model(input_ids=more, past_key_values=cache).logits)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"segments": "options"}, "segments must be images or a list"),
        ({"segments": []}, "two or more"),
        ({"segments": [[-4, -2]]}, "two or more"),
        ({"segments": [[-6, -4], [-3, -1]]}, "two or more"),
        ({"segments": [[0, 2], [2, 4]]}, "two or more"),
        ({"segments": [[-4, -2], [-2, -1]], "tail": 1}, "tail has no effect"),
        ({"tail": -1}, "tail is -1"),
        ({"layers": [0, 2]}, "layers has no effect"),
    ],
)
def test_bad_options_are_told(family: zoo.Family, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vlm_steer.attach(family.model, {"method": "pine", **bad})
