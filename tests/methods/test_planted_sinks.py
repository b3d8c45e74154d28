"""Methods that act on sinks, where the sinks and their effect are known in advance."""

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import vlm_steer
from benchmarks import planted_sinks as planted

ROWS = [planted.prompt_kinds(p, w) for p, w in zip(planted.PICTURES, planted.WORDS, strict=True)]
pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return planted.build()


@pytest.mark.parametrize("name", planted.CASES)
def test_every_weight_of_the_last_rows_is_the_one_on_paper(
    model: LlavaForConditionalGeneration, name: str
) -> None:
    case = planted.CASES[name]
    seen = planted.run(model, case, planted.inputs())
    assert planted.off(case, seen, ROWS) < 1e-5
    if name == "none":
        return
    for layer in case.layers:
        assert abs(seen.weights[0][layer] - planted.on_paper(ROWS[0])[:, -1]).max() > 0.02
    if name != "knockout":  # layers share one mask, which is edited once
        assert tuple(seen.effect) == case.layers
        expected = sum(planted.expected_mass(case, kinds) for kinds in ROWS)
        for touched in seen.effect.values():
            assert touched["mass"] == pytest.approx(expected, rel=1e-4)


def test_both_ways_of_finding_sinks_find_the_planted_ones(
    model: LlavaForConditionalGeneration,
) -> None:
    with vlm_steer.steer(model, "var") as steering:
        (status,) = steering.status()["methods"]
    assert status["notes"] == [f"sink dimensions {list(planted.SINK_DIMS)}"]
    states = model.model.language_model.embed_tokens(torch.tensor([planted.BOS, planted.TEXT]))
    image = model.model.get_image_features(
        pixel_values=planted.PICTURES[0].pixels()[None], vision_feature_layer=-2
    )
    tokens = torch.cat([states, image.pooler_output[0]])[None]
    is_sink = [0, *(2 + place for place in planted.PICTURES[0].sinks)]
    by_size = vlm_steer.functional.sink_tokens(tokens, sink_dims=planted.SINK_DIMS, tau=20.0)
    by_likeness = vlm_steer.functional.secondary_sinks(tokens, states[0], center=states[1])
    assert by_size[0].nonzero().flatten().tolist() == is_sink
    assert by_likeness[0].nonzero().flatten().tolist() == is_sink


def test_the_answer_changes_where_the_image_gains_enough(
    model: LlavaForConditionalGeneration,
) -> None:
    says = {
        name: planted.run(model, planted.CASES[name], planted.inputs()).says
        for name in ("none", "var", "act", "knockout")
    }
    assert says == {
        "none": ["guesses", "guesses"],
        "var": ["sees", "guesses"],  # too many sinks: head 0 is no longer image-centric
        "act": ["sees", "sees"],
        "knockout": ["guesses", "guesses"],
    }


def test_the_page_is_what_the_command_writes() -> None:
    assert planted.PAGE.read_text() == planted.report(), "run python benchmarks/planted_sinks.py"
