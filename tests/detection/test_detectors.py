"""Detectors read what their papers say off a trace."""

import pytest
import torch

from vlm_steer import functional as F
from vlm_steer.detection import Unit, build_detector, list_detectors, token_units
from vlm_steer.engine.hooks import Columns
from vlm_steer.errors import ConfigError, SteerError


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
