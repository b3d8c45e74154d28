"""Detectors read what their papers say off a trace."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from vlm_steer import functional as F
from vlm_steer.detection import Evidence, Unit, build_detector, list_detectors, token_units
from vlm_steer.engine.hooks import Columns
from vlm_steer.errors import ConfigError, SteerError, UnsupportedModelError
from vlm_steer.generation import encode, render_prompt
from vlm_steer.tiny import CAPTION_PROMPT, CATEGORIES, scenes


@pytest.fixture
def row(traces, eager):
    """A trace and its attention rows, ``[tokens, layers, heads, key]``."""
    trace, (length, output) = traces[0], eager[0]
    weights = torch.stack(output.attentions, dim=1)[0, :, :, length - 1 :]
    return trace, length, weights.permute(2, 0, 1, 3)[: trace.n_tokens]


def test_the_lookback_ratio_is_that_of_the_paper(row):
    trace, length, weights = row
    columns = torch.arange(weights.shape[-1])
    features = build_detector("lookback_ratio", {"parts": ["context"]}).features(
        trace, token_units(trace)
    )
    for t in range(trace.n_tokens):
        context = columns < length - trace.layout.cue
        new = (columns >= length - trace.layout.cue) & (columns < length + t)
        expected = F.lookback_ratio(weights[t], context[None], new[None])
        torch.testing.assert_close(features[t].float(), expected.flatten(), atol=1e-5, rtol=0)


def test_svar_is_the_mean_attention_on_the_image_of_its_layers(row):
    trace, _, weights = row
    unit = Unit((3, 5), (0, 1))
    is_image = torch.nn.functional.pad(trace.layout.kinds == Columns.IMAGE, (0, trace.n_tokens))
    detector = build_detector("svar", {"layers": [1, 4]})
    expected = F.summed_visual_attention_ratio(weights[3], is_image, first_layer=1, last_layer=3)
    risk = detector.raw_risk(detector.features(trace, [unit]))
    torch.testing.assert_close(-3 * risk.float(), expected, atol=1e-5, rtol=0)
    each = build_detector("svar", {"layers": [1, 4], "heads": "each"}).features(trace, [unit])
    assert each.shape == (1, 3 * weights.shape[2])
    torch.testing.assert_close(each.mean(1), risk)


def test_every_detector_gives_one_row_per_unit_and_one_width_per_model(traces):
    for name in list_detectors():
        detector = build_detector(name)
        if detector.needs_evidence:
            continue
        shapes = [detector.features(trace, token_units(trace)).shape for trace in traces]
        assert [shape[0] for shape in shapes] == [trace.n_tokens for trace in traces]
        assert shapes[0][1] == shapes[1][1]
        assert detector.features(traces[0], token_units(traces[0])).dtype == torch.float64


def test_units_pool_their_tokens(traces):
    trace = traces[0]
    unit = Unit((2, 5), (0, 1))
    first = build_detector("logprob").features(trace, [unit])
    mean = build_detector("logprob", {"pool": "mean"}).features(trace, [unit])
    assert float(first) == -float(trace.logprob[2])
    assert float(mean) == pytest.approx(-float(trace.logprob[2:5].mean()))


def test_a_detector_without_weights_says_so(traces):
    detector = build_detector("lookback_ratio")
    with pytest.raises(SteerError, match="Fit it"):
        detector.raw_risk(detector.features(traces[0], token_units(traces[0])))
    with pytest.raises(ConfigError, match="each once"):
        build_detector("lookback_ratio", {"parts": ["image", "image"]})


def test_eigenvalues_are_the_largest_and_fill_up_with_zeros(traces, eager):
    for trace, (length, output) in zip(traces, eager, strict=True):
        block = torch.stack(output.attentions)[:, 0, :, length:-1, length:-1]
        for k in (3, 20):
            found = build_detector("lap_eigvals", {"top_k": k}).features(trace, token_units(trace))
            n = min(k, block.shape[-1])
            expected = F.laplacian_eigenvalues(block, top_k=n)
            expected = torch.nn.functional.pad(expected, (0, k - n)).flatten()
            assert found.shape == (trace.n_tokens, 36 * k)
            torch.testing.assert_close(found[1].float(), expected, atol=1e-5, rtol=0)
        own = block.diagonal(dim1=-2, dim2=-1)
        logdet = build_detector("attn_logdet").features(trace, token_units(trace)[:1])
        torch.testing.assert_close(
            logdet[0].float(), own.log().mean(-1).flatten(), atol=1e-4, rtol=0
        )
        score = build_detector("attn_score", {"layer": 2}).features(trace, token_units(trace)[:1])
        torch.testing.assert_close(
            score[0, 0].float(), -own[2].log().mean(-1).sum(), atol=1e-3, rtol=0
        )


def test_the_lens_takes_the_best_of_the_tokens_of_a_word(traces):
    trace = traces[0]
    unit = Unit((2, 5), (0, 1))
    risk = build_detector("logit_lens").features(trace, [unit])
    assert float(risk) == pytest.approx(1 - float(trace.lens[2:5].max()))


def test_visual_dependence_is_what_the_image_adds(traces):
    trace = traces[0]
    risk = build_detector("visual_dependence").features(trace, token_units(trace))[:, 0]
    torch.testing.assert_close(risk, (trace.blind - trace.logprob).double())


def test_what_a_trace_does_not_hold_is_asked_for(traces):
    bare = dataclasses.replace(traces[0], lens=None, blind=None, received=None, own=None)
    for name, need in (
        ("logit_lens", "lens"),
        ("visual_dependence", "blind"),
        ("lap_eigvals", "received"),
        ("attn_score", "received"),
    ):
        with pytest.raises(SteerError, match=f"needs {need}"):
            build_detector(name).features(bare, token_units(bare))


@pytest.fixture(scope="module")
def scene(tiny):
    """A scene whose first object is large, and a text that names it and another."""
    drawn = scenes.scene("iid", 0)
    there = max(drawn.objects, key=lambda thing: thing.size).category
    absent = next(n for n in CATEGORIES if n not in {thing.category for thing in drawn.objects})
    text = f"A {there} and a {absent}."
    trace = SimpleNamespace(text=text)
    units = [
        Unit((0, 1), (text.index(name), text.index(name) + len(name)), name)
        for name in (there, absent)
    ]
    image = scenes.render(drawn)
    prompt = render_prompt(tiny[1], CAPTION_PROMPT)
    return trace, units, Evidence(image, prompt, CAPTION_PROMPT, *tiny)


@pytest.mark.parametrize("how", ["samples", "question"])
def test_asked_again_the_model_is_surer_of_what_is_there(scene, how):
    trace, units, evidence = scene
    state = torch.random.get_rng_state()
    options = {"how": how, "n_samples": 4, "max_new_tokens": 32}
    risk = build_detector("self_check", options).features(trace, units, evidence)
    assert risk.shape == (2, 1)
    assert 0 <= float(risk[0]) < float(risk[1]) <= 1
    assert torch.random.get_rng_state().equal(state)
    other = build_detector("cross_check", {**options, "models": ["tiny"]})
    torch.testing.assert_close(other.features(trace, units, evidence), risk)


def test_questions_weigh_yes_against_no(scene):
    trace, units, evidence = scene
    risk = build_detector("self_check", {"how": "question"}).features(trace, units, evidence)
    model, processor = evidence.model, evidence.processor
    prompt = render_prompt(processor, f"Is there a {units[0].name} in the image?")
    with torch.no_grad():
        logits = model(**encode(processor, [prompt], [evidence.image])).logits[0, -1]
    ids = {
        w: processor.tokenizer(w, add_special_tokens=False)["input_ids"][0]
        for w in ("yes", "Yes", " yes", " Yes", "no", "No", " no", " No")
    }
    p = logits.softmax(-1)
    yes, no = (
        sum(float(p[i]) for i in {v for k, v in ids.items() if k.strip().lower() == word})
        for word in ("yes", "no")
    )
    assert float(risk[0]) == pytest.approx(no / (yes + no), abs=1e-4)


@pytest.fixture(scope="module")
def object_detector(tmp_path_factory) -> str:
    """A tiny OWL-ViT with random weights and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("owl")
    letters = list("abcdefghijklmnopqrstuvwxyz.")
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=16
    )
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 54,
        "eos_token_id": 55,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    config = transformers.OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    torch.manual_seed(0)
    transformers.OwlViTForObjectDetection(config).save_pretrained(folder)
    images = transformers.OwlViTImageProcessorPil(size={"height": 32, "width": 32})
    transformers.OwlViTProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def test_object_detectors_give_their_best_box(scene, object_detector):
    trace, units, evidence = scene
    detector = build_detector("object_check", {"models": [object_detector, object_detector]})
    risk = detector.features(trace, units, evidence)
    (model, processor), _ = detector.loaded
    inputs = processor(images=evidence.image, text=[f"{units[0].name}."], return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits.sigmoid().max()
    assert float(risk[0]) == pytest.approx(1 - float(best), abs=1e-6)
    assert float(risk[0]) != float(risk[1])


def test_second_opinions_say_what_they_need(scene, tmp_path):
    trace, units, evidence = scene
    with pytest.raises(SteerError, match="evidence"):
        build_detector("self_check").features(trace, units)
    with pytest.raises(ConfigError, match=r"cross_check\.models"):
        build_detector("cross_check").features(trace, units, evidence)
    with pytest.raises(ConfigError, match=r"object_check\.models"):
        build_detector("object_check").features(trace, units, evidence)
    with pytest.raises(UnsupportedModelError, match="zero-shot"):
        build_detector("object_check", {"models": [str(tmp_path)]}).features(trace, units, evidence)
    with pytest.raises(ConfigError, match="temperature"):
        build_detector("self_check", {"temperature": 0})
