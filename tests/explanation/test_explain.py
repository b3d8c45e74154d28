"""What ``vlm_steer.explain`` returns."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import vlm_steer
from vlm_steer.detection import FittedDetector, build_detector, made_for, trace_generation
from vlm_steer.engine.model import ModelInfo
from vlm_steer.errors import ConfigError, DataError, UnsupportedModelError
from vlm_steer.explanation import differing, split_words
from vlm_steer.explanation.checks import Check, check_words, dictated, read_again
from vlm_steer.explanation.excess import excess
from vlm_steer.explanation.risk import load_detectors
from vlm_steer.explanation.words import Word
from vlm_steer.generation import encode, render_prompt
from vlm_steer.tiny import scenes


def test_the_answers_are_those_of_plain_generation(result, tiny, picture):
    model, processor = tiny
    inputs = encode(processor, [render_prompt(processor, result.prompt)], [picture])
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with vlm_steer.steer(model, {"method": "pai", "alpha": 0.2, "gamma": 1.0}):
        steered = model.generate(**inputs, **options)
    start = inputs["input_ids"].shape[1]
    assert result.arms[0].trace.ids.tolist() == plain[0, start:].tolist()
    assert result.arms[1].trace.ids.tolist() == steered[0, start:].tolist()
    assert result.text == result.arms[1].trace.text
    assert [arm.name for arm in result.arms] == ["none", "pai"]


def test_a_heat_map_is_the_attention_of_the_word_in_pixels_of_the_picture(result, picture):
    word = result.words[3]
    heat = result.heatmap(3)
    assert heat.shape == (picture.height, picture.width)
    mass = result.arm.trace.maps[slice(*word.tokens)].float().mean(dim=(0, 1, 2)).sum()
    assert float(heat.sum()) == pytest.approx(float(mass), rel=1e-4)
    np.testing.assert_array_equal(result.heatmap(word), heat)
    first = word.tokens[0]
    by_layer = [result.heatmap(token=first, layers={"indices": [i]}) for i in range(6)]
    by_head = [result.heatmap(token=first, heads=[i]) for i in range(6)]
    np.testing.assert_allclose(np.mean(by_layer, axis=0), np.mean(by_head, axis=0), atol=1e-7)


def test_the_head_map_is_the_mass_on_the_image(result):
    word = result.words[2]
    expected = result.arm.trace.maps[slice(*word.tokens)].float().sum(-1).mean(0)
    np.testing.assert_allclose(result.head_map(word), expected, atol=1e-3)


def test_a_heat_map_beyond_the_place_leaves_out_what_a_line_predicts(result):
    maps = torch.stack([result.arm.attention(word.tokens) for word in result.words])
    places = np.arange(len(maps))
    expected = np.stack([np.polyval(np.polyfit(places, cell, 1), 4) for cell in maps.numpy().T])
    by_place = np.maximum(maps[4].numpy() - expected, 0)
    np.testing.assert_allclose(excess(maps, 4, "position"), by_place, atol=1e-6)
    heat = result.heatmap(4, beyond="position")
    np.testing.assert_allclose(heat, result.places[0].spread(torch.tensor(by_place)), atol=1e-7)
    np.testing.assert_allclose(excess(maps, 4, "mean"), (maps[4] - maps.mean(0)).clamp(min=0))
    rising = torch.arange(5.0)[:, None] * torch.tensor([1.0, -2.0]) + 9
    assert excess(rising, 3, "position").abs().max() < 1e-5
    assert excess(rising, 3, "mean").tolist() == [1, 0]


def test_what_lies_beyond_takes_three_words(result):
    with pytest.raises(ConfigError, match="the answer has 2; 3 are the fewest"):
        excess(torch.rand(2, 4), 0, "position")
    with pytest.raises(ConfigError, match="compares words; give a word"):
        result.heatmap(token=0, beyond="mean")


def test_maps_are_kept_in_half_precision(result):
    assert {arm.trace.maps.dtype for arm in result.arms} == {torch.float16}


# -- layers -------------------------------------------------------------------------------------
def test_layers_are_read_as_the_model_reads_its_last(tiny, picture, result):
    model, processor = tiny
    prompt = render_prompt(processor, result.prompt)
    inputs = encode(processor, [prompt], [picture])
    trace, lens = result.arms[0].trace, result.arms[0].lens
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], trace.ids[None]], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        hidden = model(**whole, output_hidden_states=True).hidden_states
        states = torch.stack(hidden[1:-1])[:, 0, -trace.n_tokens - 1 : -1]
        logits = model.lm_head(model.model.language_model.norm(states)).log_softmax(-1)
    chosen = logits.gather(-1, trace.ids.expand(len(logits), -1)[..., None])[..., 0]
    torch.testing.assert_close(lens.logprob[:, :-1], chosen.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(lens.logprob[:, -1], trace.logprob, rtol=0, atol=1e-4)
    assert set(lens.names) == set(lens.best.flatten().tolist())


def test_the_layers_of_a_steered_answer_are_those_under_the_steering(result):
    plain, steered = (arm.lens for arm in result.arms)
    n = min(len(plain.logprob), len(steered.logprob))
    assert (plain.logprob[:n] - steered.logprob[:n]).abs().max() > 1e-2
    torch.testing.assert_close(steered.logprob[:, -1], result.arm.trace.logprob, rtol=0, atol=1e-4)
    np.testing.assert_allclose(result.lens(2), steered.logprob[result.words[2].tokens[0]].exp())


def test_layers_that_cannot_be_read_are_left_out_with_the_reason(tiny, picture, monkeypatch):
    def refuse(self):
        raise UnsupportedModelError("no output head")

    monkeypatch.setattr(ModelInfo, "readout", property(refuse))
    seen = vlm_steer.explain(*tiny, picture, "What is here?", checks=0, max_new_tokens=2)
    assert "Layers were not read: no output head" in seen.to_html()
    with pytest.raises(ConfigError, match="no output head"):
        seen.lens(0)
    unread = vlm_steer.explain(
        *tiny, picture, "What is here?", checks=0, lens=False, max_new_tokens=2
    )
    assert "Layers were not read" not in unread.to_html()
    with pytest.raises(ConfigError, match="give lens=True"):
        unread.lens(0)


# -- a table ------------------------------------------------------------------------------------
def test_a_data_frame_has_a_row_per_word_of_every_answer(result):
    frame = result.to_dataframe()
    assert list(frame["arm"]) == [arm.name for arm in result.arms for _ in arm.words]
    mine = frame[frame["arm"] == "pai"].reset_index()
    assert tuple(mine["word"]) == tuple(word.text for word in result.words)
    assert tuple(mine["risk_svar"]) == result.risk["svar"]
    np.testing.assert_allclose(mine.filter(like="mass_").sum(axis=1), 1, atol=1e-4)
    assert set(mine.index[mine["check_without_cells"].notna()]) == set(result.arm.checks)


def test_a_data_frame_without_pandas_says_what_to_install(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        result.to_dataframe()


# -- sinks --------------------------------------------------------------------------------------
def test_attention_to_sinks_is_shown_only_when_asked_for(result):
    trace = result.arm.trace
    sinks = torch.zeros_like(trace.sinks)
    sinks[1, trace.layout.image_columns[[0, 5]]] = True
    hiding = replace(result, arms=(replace(result.arm, trace=replace(trace, sinks=sinks)),))
    assert hiding.arm.sinks.nonzero().flatten().tolist() == [0, 5]
    hidden, shown = hiding.heatmap(0), hiding.heatmap(0, sinks=True)
    box = hiding.places[0].boxes[5]
    middle = (int(box[1::2].mean()), int(box[::2].mean()))
    assert hidden[middle] == 0 < shown[middle]
    np.testing.assert_array_equal(shown, result.heatmap(0))


def test_tokens_carry_their_text_and_the_blocks_they_attended_to(result):
    assert "".join(token.text for token in result.tokens) == result.text
    for token in result.tokens:
        assert sum(token.masses.values()) == pytest.approx(1, abs=1e-4)
        assert token.logprob <= 0


def test_words_at_and_above_the_threshold_are_flagged(result):
    risks = result.risk["svar"]
    tau = sorted(risks)[-2]
    flagged = result.flagged(tau, detector="svar")
    assert flagged == tuple(w for w, r in zip(result.words, risks, strict=True) if r >= tau)
    assert len(result.flagged(-1e9)) == len(result.words)
    assert result.arm.position == tuple(float(i) for i in range(len(result.words)))
    with pytest.raises(ConfigError, match="no detector 'entropy' was asked for"):
        result.flagged(0.5, detector="entropy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"word": "zebra"}, "has no word 'zebra'"),
        ({"word": 99}, "word 99 does not exist"),
        ({"token": -1}, "token -1 does not exist"),
        ({"word": 0, "token": 0}, "either a word or token"),
        ({}, "either a word or token"),
        ({"word": 0, "heads": [6]}, "not among the 6"),
        ({"word": 0, "layers": (5, 8)}, "reach outside this model"),
    ],
)
def test_what_does_not_exist_is_named(result, arguments, message):
    with pytest.raises(ConfigError, match=message):
        result.heatmap(**arguments)


# -- checks -------------------------------------------------------------------------------------
def test_reading_and_writing_again_rate_a_text_alike(tiny, picture):
    model, processor = tiny
    inputs = encode(processor, [render_prompt(processor, "Describe the image.")], [picture])
    (trace,) = trace_generation(model, processor, inputs, max_new_tokens=5, do_sample=False)
    read, written = (
        read_again(model, inputs, trace.ids),
        dictated(model, processor, inputs, trace.ids, ()),
    )
    torch.testing.assert_close(read([3, 9], 5), written([3, 9], 5), rtol=0, atol=1e-4)
    with pytest.warns(UserWarning, match="changed nothing"):
        whole = read([], 5)
    torch.testing.assert_close(whole, trace.logprob, rtol=0, atol=1e-4)
    assert (read(range(64), 5) - trace.logprob).abs().max() > 0.1


def test_checks_cut_what_the_word_looked_at_and_compare_with_as_many_others():
    asked = []

    def without(image_tokens, n):
        asked.append(tuple(image_tokens))
        lost = 2.0 if {1, 4} <= set(image_tokens) else 0.5
        return torch.full((n,), -1.0 - lost)

    word = Word("bus", (0, 3), (1, 3))
    attention = torch.tensor([0.9, 0.5, 0.1, 0.0, 0.4, 0.2])
    is_open = torch.tensor([False, True, True, True, True, True])  # the first is a sink
    (check,) = check_words(
        without, -torch.ones(4), [word], [attention], is_open=is_open, share=0.4, seed=0
    )
    assert check.cells == (1, 4)
    assert asked[0] == tuple(range(6))
    assert set(asked[2]).isdisjoint({0, 1, 4})
    assert len(asked[2]) == 2
    assert (check.logprob, check.without_cells, check.without_others) == (-2.0, -6.0, -3.0)
    assert check.without_image == -6.0
    assert check.effect == 3.0


def test_the_riskiest_words_are_checked(result):
    for arm in result.arms:
        risk = arm.risk["logprob"]
        long = [risk[i] for i, word in enumerate(arm.words) if len(word.text) > 3]
        assert {risk[i] for i in arm.checks} == set(sorted(long)[-2:])
        for number, check in arm.checks.items():
            tokens = slice(*arm.words[number].tokens)
            assert check.logprob == pytest.approx(float(arm.trace.logprob[tokens].sum()))
            assert len(check.cells) == round(0.1 * len(result.places[0].boxes))


def test_words_can_be_checked_by_name(tiny, picture):
    with pytest.warns(UserWarning, match="no answer has the word 'zebra'"):
        seen = vlm_steer.explain(
            *tiny, picture, "Describe the image.", checks=["IMAGE", "zebra"], max_new_tokens=4
        )
    assert [seen.words[number].text.casefold() for number in seen.arm.checks] == ["image"]


def test_a_word_that_a_mask_rules_out_is_minus_infinity(tiny, picture):
    model, processor = tiny
    inputs = encode(processor, [render_prompt(processor, "Describe the image.")], [picture])
    (trace,) = trace_generation(model, processor, inputs, max_new_tokens=12, do_sample=False)
    mask = vlm_steer.get_method("plausibility_mask")(beta=0.99)
    without_image = dictated(model, processor, inputs, trace.ids, [mask])(range(64), 12)
    assert without_image.isneginf().any()
    assert Check((0,), -1.0, -math.inf, -3.0, -math.inf).effect == math.inf
    assert math.isnan(Check((0,), -1.0, -math.inf, -math.inf, -math.inf).effect)


# -- several pictures ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def several(tiny, picture):
    """Two pictures in one prompt, the second one standing."""
    second = scenes.render(scenes.scene("broken", 1)).resize((80, 110))
    return vlm_steer.explain(
        *tiny, [picture, second], "Describe the images.", checks=1, max_new_tokens=8
    )


def test_every_picture_of_a_prompt_has_its_own_heat_map(several):
    assert several.arm.trace.maps.shape[-1] == 128
    first, second = (several.heatmap(2, image=i, sinks=True) for i in range(2))
    assert (first.shape, second.shape) == ((90, 120), (110, 80))
    weights = several.arm.attention(several.words[2].tokens, sinks=True)
    assert float(first.sum()) == pytest.approx(float(weights[:64].sum()), rel=1e-4)
    assert float(second.sum()) == pytest.approx(float(weights[64:].sum()), rel=1e-4)
    with pytest.raises(ConfigError, match="picture 2 does not exist; there are 2"):
        several.heatmap(0, image=2)


def test_cells_of_all_pictures_are_checked_together(several):
    (check,) = several.arm.checks.values()
    assert len(check.cells) == round(0.1 * int((~several.arm.sinks).sum()))
    assert set(check.cells) <= set(range(128))


def test_what_looks_at_one_picture_refuses_several(tiny, picture):
    with pytest.raises(ConfigError, match="self_check looks at a single picture, and 2 were"):
        vlm_steer.explain(*tiny, [picture] * 2, "What is here?", detectors=["self_check"])
    with pytest.raises(ConfigError, match="no picture was given"):
        vlm_steer.explain(*tiny, [], "What is here?")


def test_a_detector_that_asks_the_model_again_may(tiny, picture):
    asking = build_detector("self_check", {"n_samples": 2, "max_new_tokens": 2})
    seen = vlm_steer.explain(
        *tiny, picture, "Is there a dog?", detectors=[asking], checks=0, max_new_tokens=2
    )
    assert len(seen.risk["self_check"]) == len(seen.words)


# -- words --------------------------------------------------------------------------------------
def words(text):
    return [Word(part, (0, 0), (0, 1)) for part in text.split()]


def test_words_that_the_other_answer_lacks_differ():
    ours, others = words("A white bus and a dog"), words("a red bus and a big dog")
    assert differing(ours, others) == (False, True, False, False, False, False)
    assert differing(others, ours) == (False, True, False, False, False, True, False)
    assert differing(ours, []) == (True,) * 6


def test_words_are_found_with_the_tokens_that_write_them(result):
    trace = result.arm.trace
    text, spans = "It's a T-shirt, 山 川!", ((0, 4), (4, 8), (8, 14), (14, 17), (17, 20))
    planted = replace(trace, text=text, spans=spans, ids=trace.ids[:5])
    found = [(word.text, word.tokens) for word in split_words(planted)]
    assert found == [
        ("It's", (0, 1)),
        ("a", (1, 2)),
        ("T-shirt", (1, 3)),
        ("山", (3, 4)),
        ("川", (4, 5)),
    ]


# -- bad input ----------------------------------------------------------------------------------
def test_a_model_without_places_is_explained_without_heat_maps(tiny, picture, monkeypatch):
    def refuse(*_, **__):
        raise UnsupportedModelError("its image tokens are learned queries")

    monkeypatch.setattr("vlm_steer.explanation.explaining.place_tokens", refuse, raising=True)
    seen = vlm_steer.explain(*tiny, picture, "Describe the image.", max_new_tokens=3)
    assert seen.words
    assert "There is no heat map: its image tokens are learned queries" in seen.to_html()
    with pytest.raises(UnsupportedModelError, match="learned queries"):
        seen.heatmap(0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"detectors": ["svarr"]}, ConfigError, "Did you mean 'svar'"),
        ({"detectors": ["lookback_ratio"]}, ConfigError, "says nothing before it is fitted"),
        ({"detectors": ["svar", "svar"]}, ConfigError, "two detectors are svar"),
        ({"checks": -1}, ConfigError, "checks is -1"),
        ({"check_share": 0.7}, ConfigError, "check_share is 0.7"),
        ({"num_return_sequences": 2}, ConfigError, "one answer"),
        ({"methods": "vaar"}, ConfigError, "Did you mean 'var'"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(tiny, picture, options, error, message):
    with pytest.raises(error, match=message):
        vlm_steer.explain(*tiny, picture, "Describe the image.", **options)


def test_a_missing_picture_is_named(tiny, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        vlm_steer.explain(*tiny, tmp_path / "gone.png", "What is here?")


def test_a_detector_of_another_model_is_refused(tiny, tmp_path):
    own = made_for(*tiny)
    FittedDetector(build_detector("svar"), made_for=own).save_pretrained(tmp_path / "own")
    FittedDetector(build_detector("svar"), made_for={**own, "cue": 99}).save_pretrained(
        tmp_path / "other"
    )
    assert list(load_detectors([tmp_path / "own"], *tiny)) == ["svar"]
    with pytest.raises(ConfigError, match="made for another model"):
        load_detectors([tmp_path / "other"], *tiny)


def test_a_detector_that_reads_the_text_again_needs_an_unsteered_model(result, tiny):
    from vlm_steer.explanation.risk import with_needs

    class Blind(type(build_detector("svar"))):
        needs = ("blind",)

    detectors = {"blind": FittedDetector(Blind())}
    with pytest.raises(ConfigError, match="without steering"):
        with_needs(result.arm.trace, detectors, *tiny, {}, is_steered=True)
