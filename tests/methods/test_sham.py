"""A sham changes as much as the method it imitates, and elsewhere."""

import pytest
import torch

import vlm_steer
from tests.families import zoo
from vlm_steer import functional as F
from vlm_steer.engine.hooks import Method
from vlm_steer.errors import ConfigError, UnsupportedModelError
from vlm_steer_eval.running.arms import parse_arms


def test_moved_mass_is_what_was_asked_for_and_rows_keep_their_sum():
    weights = torch.rand(2, 3, 4, 10).softmax(dim=-1)
    columns = torch.rand(2, 10) < 0.5
    columns[:, 0] = True
    mass = torch.full((2, 3, 4, 1), 0.05)
    moved = F.move_to_columns(weights, columns, mass)
    torch.testing.assert_close(moved.sum(dim=-1), weights.sum(dim=-1))
    torch.testing.assert_close((moved - weights).abs().sum(dim=-1, keepdim=True) / 2, mass)
    assert (moved >= weights)[:, :, :, :][columns[:, None, None, :].expand_as(moved)].all()


def test_a_row_with_nothing_on_the_columns_is_left_alone():
    weights = torch.tensor([[[[0.5, 0.5, 0.0]]]])
    columns = torch.tensor([[False, False, True]])
    assert torch.equal(F.move_to_columns(weights, columns, torch.tensor(0.3)), weights)


def test_shuffled_columns_are_the_same_values_and_others_stay():
    values = torch.arange(6.0).reshape(1, 1, 6)
    columns = torch.tensor([[False, True, True, False, True, True]])
    shuffled = F.shuffle_columns(values, columns, torch.tensor([[0.0, 0.9, 0.1, 0.0, 0.5, 0.2]]))
    assert shuffled.flatten().tolist() == [0.0, 2.0, 5.0, 3.0, 4.0, 1.0]


def test_left_padding_moves_the_places_along():
    values, seats = torch.rand(1, 1, 5), torch.rand(1, 5)
    columns = torch.tensor([[True, True, True, False, True]])
    alone = F.shuffle_columns(values, columns, seats)
    pad = torch.nn.functional.pad
    padded = F.shuffle_columns(pad(values, (3, 0)), pad(columns, (3, 0)), pad(seats, (3, 0)))
    assert torch.equal(padded[..., 3:], alone)


@pytest.mark.parametrize(
    "of",
    [
        "vhr",
        "mma",
        "spin",
        {"method": "pai", "alpha": 0.5, "gamma": 1.0},
        {"method": "var", "sink_dims": [1, 2], "tau": 1.5, "min_image_mass": 0.0},
    ],
    ids=lambda of: of if isinstance(of, str) else of["method"],
)
def test_a_sham_differs_from_the_base_and_from_what_it_imitates(of):
    family = zoo.load("llava")
    inputs = family.inputs(n_text=6, seed=0)
    outputs = []
    for spec in (None, of, {"method": "sham", "of": of}):
        with vlm_steer.steer(family.model, spec), torch.no_grad():
            outputs.append(family.model(**inputs).logits)
    base, real, sham = outputs
    assert not torch.allclose(real, base)
    assert not torch.allclose(sham, base)
    assert not torch.allclose(sham, real)


def test_a_sham_of_vhr_changes_as_many_heads_by_the_same_factor():
    sham = vlm_steer.get_method("sham")(of={"method": "vhr", "alpha": 3.0})
    assert sham.rows == "all"
    assert sham.overrides("heads")
    assert not sham.overrides("weights")


def test_a_neutral_method_has_a_neutral_sham():
    assert vlm_steer.get_method("sham")(of={"method": "vhr", "alpha": 1.0}).is_neutral()


@pytest.mark.parametrize(
    "of", ["vcd", "pai", "cca", "dola", "sham", "lookback_ratio", "none", "pai+var"]
)
def test_what_has_no_sham_is_refused(of):
    with pytest.raises(ConfigError, match=r"imitate|takes one"):
        vlm_steer.get_method("sham")(of=of)


def test_a_sham_refuses_the_models_that_its_method_refuses():
    with pytest.raises(UnsupportedModelError):
        vlm_steer.attach(zoo.load("mllama").model, {"method": "sham", "of": "mma"})


def test_an_arm_can_be_a_sham():
    arms = parse_arms("none,var,sham:var")
    assert [arm.name for arm in arms] == ["none", "var", "sham:var"]
    assert arms[2].config["methods"] == [{"method": "sham", "of": "var", "seed": 0}]


def test_a_sham_follows_every_hook_and_need_or_refuses_them():
    refused = {"positions", "embeds", "choose", "chooses_once", "own", "select_taps"}
    refused |= {"branches", "logits", "plausible", "observe", "observer"}
    refused |= {"requests", "first_words", "needs_processor", "observes_rows"}
    refused |= {"search", "search_setup", "vision"}
    elsewhere = {"name", "paper", "layers", "scope", "notes", "candidates", "calibrated"}
    elsewhere |= {"require", "replace", "refuse_ignored", "own_heads"}
    names = {name for name in vars(Method) if not name.startswith("_")} - refused - elsewhere
    assert names <= set(vars(type(vlm_steer.get_method("sham")())))
