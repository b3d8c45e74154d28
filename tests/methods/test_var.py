"""VAR's ways of finding sinks, where the sinks are known in advance."""

import pytest
import torch
from torch import Tensor, nn

import vlm_steer
from tests.families import zoo
from tests.methods.views import IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer.errors import ConfigError, SteerWarning
from vlm_steer.functional import secondary_sinks, sink_lifetimes
from vlm_steer.methods.var import VAR, FirstToken

DIMS = [5, 20]
IMAGE_SINK = 7


def plant(family: zoo.Family, prompt: int) -> None:
    """Make the first token of every prompt, and one image token of prompts so long, massive."""

    def massive(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == 1:
            return None
        hidden = hidden.clone()
        at = [0, IMAGE_SINK] if hidden.shape[1] == prompt else [0]
        for position in at:
            hidden[:, position, DIMS] = 1e4
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    layer = family.model.get_decoder().layers[0]
    layer.register_forward_pre_hook(massive, with_kwargs=True, prepend=True)


def logits(family: zoo.Family, batch: dict[str, Tensor], spec: object) -> Tensor:
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    with vlm_steer.steer(family.model, spec):
        output = family.model.generate(**batch, **options, return_dict_in_generate=True)
    return torch.stack(output.logits)


def test_both_ways_find_the_same_planted_sinks() -> None:
    family = zoo.load("llava")
    row = family.inputs(n_text=7)
    assert family.expected_image_mask(row)[0, IMAGE_SINK]
    plant(family, row["input_ids"].shape[1])
    batch = family.batch([row])
    common = {"method": "var", "min_image_mass": 0.0, "max_sink_ratio": 1.0}
    by_dimension = logits(family, batch, {**common, "sink_dims": DIMS, "tau": 3.5})
    by_likeness = logits(family, batch, {**common, "sinks": "secondary", "min_received": 0.0})
    assert torch.equal(by_dimension, by_likeness)
    assert not torch.equal(by_dimension, logits(family, batch, None))


def test_a_token_is_marked_by_its_direction_whatever_all_tokens_share() -> None:
    shared = torch.tensor([10.0, 10.0, 0.0, 0.0])
    sink, other = torch.tensor([0.0, 0.0, 5.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    hidden = shared + torch.stack([sink, other, 0.5 * sink + 0.1 * other, -other])[None]
    assert secondary_sinks(hidden, shared + sink).all()  # all are alike in what they share
    expected = [[True, False, True, False]]
    assert secondary_sinks(hidden, shared + sink, center=shared).tolist() == expected
    plan = FirstToken((shared + sink)[None], shared[None], 5.0)
    at = view([SYSTEM, IMAGE, IMAGE, INSTRUCTION], rows=4, plan=plan)
    assert VAR(sinks="secondary").marks(hidden, at).tolist() == expected


def test_only_tokens_that_draw_attention_are_sinks() -> None:
    states = torch.tensor([1.0, 0.0]).expand(2, 6, 2)
    mask = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    received = torch.tensor([0.9, 0.04, 0.06, 0.0, 0.4, 0.02]).expand(2, 6)
    marked = secondary_sinks(
        states, states[:, 0], received=received, mask=mask, min_cosine=0.5, min_received=0.3
    )
    assert marked.tolist() == [
        [True, False, True, False, True, False],
        [False, False, False, False, True, False],
    ]


def test_a_row_gives_only_by_what_it_looks_at() -> None:
    kinds = [SYSTEM, IMAGE, IMAGE, IMAGE, INSTRUCTION, INSTRUCTION]
    marks = torch.tensor([[True, True, False, False, False, False]])
    weights = torch.tensor(
        [[0.35, 0.35, 0.1, 0.1, 0.1, 0.0], [0.5, 0.1, 0.2, 0.1, 0.05, 0.05]]
    ).expand(1, 2, 2, 6)
    method = VAR(sinks="secondary", min_received=1.5, max_sink_ratio=1.0, keep=0.5)
    at = view(kinds, rows=2, marks=marks)
    steered = method.weights(weights, at)
    # The first row gives from both sinks; in the second no image token draws 1.5 of 6 shares.
    expected = torch.tensor([0.175, 0.175, 0.275, 0.275, 0.1, 0.0])
    torch.testing.assert_close(steered[0, 0, 0], expected)
    torch.testing.assert_close(steered[0, 0, 1], weights[0, 0, 1])


def test_lifetimes_are_the_first_and_the_last_layer_of_a_mark() -> None:
    marked = torch.tensor([[[0, 1, 0]], [[0, 1, 1]], [[0, 0, 0]], [[0, 0, 1]]]).bool()
    lifetimes = sink_lifetimes(marked)
    assert lifetimes.birth.tolist() == [[-1, 0, 1]]
    assert lifetimes.death.tolist() == [[-1, 1, 3]]


def test_a_model_whose_first_token_is_like_others_is_warned_of() -> None:
    family = zoo.load("llava")
    with pytest.warns(SteerWarning, match="first token is like others"):
        handle = vlm_steer.attach(family.model, "var_secondary")
    handle.detach()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"min_cosine": 0.9}, "min_cosine"),
        ({"sinks": "secondary", "tau": 20.0}, "tau"),
        ({"sinks": "secondary", "sink_dims": [1]}, "sink_dims"),
    ],
)
def test_options_of_the_other_way_are_refused(options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has no effect"):
        VAR(**options)


@pytest.mark.parametrize(("option", "value"), [("min_cosine", 1.5), ("min_received", -1.0)])
def test_a_number_outside_its_range_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        VAR(sinks="secondary", **{option: value})
