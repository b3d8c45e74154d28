"""Traces are what eager attention and whole logits would show, however they were recorded."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.contract.test_contract import two_rows
from tests.detection.conftest import NEW
from tests.families import zoo
from vlm_steer import functional as F
from vlm_steer.detection import char_spans, trace_answers, trace_generation
from vlm_steer.engine.hooks import Columns
from vlm_steer.errors import ConfigError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

WORDS = SimpleNamespace(decode=lambda ids, **_: "".join(f" {i}" for i in ids))


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_attention_features_are_those_of_eager_attention(traces, eager):
    for trace, (length, output) in zip(traces, eager, strict=True):
        n, kinds = trace.n_tokens, trace.layout.kinds
        weights = torch.stack(output.attentions, dim=1)[0, :, :, length - 1 : length - 1 + n]
        weights = weights.permute(2, 0, 1, 3)
        is_image = torch.nn.functional.pad(kinds == Columns.IMAGE, (0, n))
        cue = torch.arange(length + n).ge(length - 5) & torch.arange(length + n).lt(length)
        expected = [
            weights[..., : trace.layout.images[0][0]].sum(-1),
            weights[..., is_image].sum(-1),
            weights[..., trace.layout.images[0][1] : length - 5].sum(-1),
            weights[..., cue].sum(-1),
            weights[..., length:].sum(-1),
        ]
        assert trace.layout.blocks == ("system", "image_0", "instruction", "cue", "generated")
        assert_equal(trace.masses, torch.stack(expected, dim=-1))
        seen = weights[..., is_image]
        assert trace.maps.dtype == torch.float16
        lost = (trace.maps.float() - seen).abs() - 1e-5
        assert (lost <= seen / 2048 + 6e-8).all()
        share = weights[..., is_image] / weights[..., is_image].sum(-1, keepdim=True)
        entropy = -(share * share.log()).sum(-1) / torch.tensor(64.0).log()
        assert_equal(trace.image_entropy, entropy)
        assert_equal(trace.sink_mass, weights[..., 0])


def test_logit_features_are_those_of_the_whole_distribution(traces, answers, eager):
    for trace, answer, (length, output) in zip(traces, answers, eager, strict=True):
        logprobs = output.logits[0, length - 1 : -1].log_softmax(-1)
        assert_equal(trace.logprob, logprobs.gather(1, answer[:, None])[:, 0])
        assert_equal(trace.entropy, torch.distributions.Categorical(logits=logprobs).entropy())
        top = logprobs.topk(2).values
        assert_equal(trace.margin, top[:, 0] - top[:, 1], 2e-5)


def test_received_attention_gives_the_eigenvalues_of_the_laplacian_of_the_response(traces, eager):
    for trace, (length, output) in zip(traces, eager, strict=True):
        block = torch.stack(output.attentions)[:, 0, :, length:-1, length:-1]
        expected = F.laplacian_eigenvalues(block, top_k=block.shape[-1])
        eigenvalues = trace.received / trace.n_rows[:, None] - trace.own
        assert_equal(eigenvalues.sort(dim=-1, descending=True).values, expected)


def test_the_lens_and_the_pass_without_image_read_what_the_model_says(tiny, traces, inputs, eager):
    model = tiny[0]
    for row, (trace, (_length, output)) in enumerate(zip(traces, eager, strict=True)):
        norm, head = model.model.language_model.norm, model.lm_head
        states = torch.stack(output.hidden_states[1:-1])[:, 0, trace.layout.image_columns]
        with torch.no_grad():
            read = head(norm(states)).softmax(-1)[..., trace.ids].amax(1)
        assert_equal(trace.lens[:, :-1], read.T)
        kept = inputs["attention_mask"][row].bool()
        prompt = inputs["input_ids"][row][kept][trace.layout.kinds != Columns.IMAGE]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, trace.ids])[None]).logits
        logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert_equal(trace.blind, logprobs.gather(1, trace.ids[:, None])[:, 0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_trace_made_while_generating_is_that_of_one_pass_over_the_text(tiny, inputs, options):
    model, processor = tiny
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    with torch.no_grad():
        plain = model.generate(**inputs, **options)
    online = trace_generation(model, processor, inputs, needs=("maps",), **options)
    for row, trace in enumerate(online):
        assert plain[row, inputs["input_ids"].shape[1] :][: trace.n_tokens].equal(trace.ids)
    forced = trace_answers(
        model, processor, inputs, [trace.ids for trace in online], needs=("maps",)
    )
    for a, b in zip(online, forced, strict=True):
        assert a.text == b.text
        assert a.spans == b.spans
        assert a.sinks.equal(b.sinks)
        for name in ("logprob", "entropy", "margin", "masses", "sink_mass"):
            assert_equal(getattr(a, name), getattr(b, name), 2e-5)
        assert_equal(a.maps, b.maps, 5e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "mllama", "instructblip"])
def test_families_are_traced_alike_online_and_in_one_pass(name):
    family = zoo.load(name)
    batch = two_rows(family)
    processor = SimpleNamespace(tokenizer=WORDS)
    online = trace_generation(family.model, processor, batch, max_new_tokens=4, do_sample=False)
    forced = trace_answers(family.model, processor, batch, [trace.ids for trace in online])
    for a, b in zip(online, forced, strict=True):
        assert a.masses.shape[1:] == (zoo.LAYERS, zoo.HEADS, len(a.layout.blocks))
        assert a.layout.images
        for field in ("logprob", "masses", "image_entropy", "sink_mass"):
            assert_equal(getattr(a, field), getattr(b, field), 1e-4)


def test_the_trace_of_a_steered_generation_shows_the_steered_attention(tiny, inputs):
    options = {"max_new_tokens": 3, "do_sample": False}
    plain = trace_generation(*tiny, inputs, **options)[0].image_mass[0].mean()
    steered = (
        trace_generation(
            *tiny, inputs, methods={"method": "pai", "alpha": 1.0, "gamma": 1.0}, **options
        )[0]
        .image_mass[0]
        .mean()
    )
    assert steered > plain + 0.05


def test_tokens_write_the_characters_of_the_text(traces):
    for trace in traces:
        assert "".join(trace.text[a:b] for a, b in trace.spans) == trace.text
        word = trace.text.split()[1]
        start = trace.text.index(word)
        first, stop = trace.tokens_of((start, start + len(word)))
        written = "".join(trace.text[a:b] for a, b in trace.spans[first:stop])
        assert written.strip().startswith(word)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them():
    pieces = [b"caf", "é".encode()[:1], "é".encode()[1:], b"s"]

    def decode(ids, **_):
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    text, spans = char_spans(SimpleNamespace(decode=decode), [0, 1, 2, 3])
    assert text == "cafés"
    assert spans == ((0, 3), (3, 3), (3, 4), (4, 5))


def test_what_cannot_be_traced_is_refused(tiny, inputs, answers):
    with pytest.raises(ConfigError, match="trace_answers"):
        trace_generation(*tiny, inputs, needs=("blind",))
    with pytest.raises(ConfigError, match="one answer of at least one token"):
        trace_answers(*tiny, inputs, answers[:1])
    with pytest.raises(ConfigError, match="output_logits"):
        trace_generation(*tiny, inputs, output_logits=True)
    family = zoo.load("gemma3")
    batch = two_rows(family)
    with pytest.raises(UnsupportedModelError, match="both directions"):
        trace_answers(
            family.model,
            SimpleNamespace(tokenizer=WORDS),
            batch,
            [[20, 21], [22]],
            needs=("received",),
            received_scope="sequence",
        )
