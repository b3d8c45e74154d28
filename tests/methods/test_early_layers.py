"""DoLa, DeCo and SLA where their effect is known in advance."""

import math

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import generate, two_rows
from tests.families import zoo
from vlm_steer import functional as F
from vlm_steer.engine.hooks import LogitsAt
from vlm_steer.errors import ConfigError
from vlm_steer.methods.deco import DeCo
from vlm_steer.methods.dola import DoLa
from vlm_steer.methods.sla import SLA

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")


def seen(final: Tensor, early: Tensor) -> LogitsAt:
    """A step whose early logits are planted; without the norm they are negated."""

    def to_logits(hidden: Tensor, *, normed: bool = True, mean: bool = False) -> Tensor:
        logits = hidden if normed else -hidden
        return logits.mean(dim=1, keepdim=True) if mean else logits

    return LogitsAt(
        raw=final,
        branches={},
        step=0,
        plan=None,
        prepared=None,
        tapped={None: early},
        to_logits=to_logits,
    )


FINAL = torch.tensor([[2.0, 1.5, 1.0, -3.0], [0.0, 3.0, 2.9, 2.8]])


def test_dola_chooses_the_layer_that_differs_in_every_row_by_itself() -> None:
    other = torch.tensor([[-1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    # The first row differs in layer 0, the second in layer 1.
    early = torch.stack([torch.stack([other[0], FINAL[1]]), torch.stack([FINAL[0], other[1]])], 1)
    logits = DoLa(norm=True, relative_top=0.0).logits(FINAL, seen(FINAL, early))
    expected = FINAL.log_softmax(-1) - other.log_softmax(-1)
    torch.testing.assert_close(logits, expected)


def test_dola_rules_out_what_each_row_by_itself_finds_implausible() -> None:
    early = torch.randn(2, 3, 4)
    logits = DoLa(relative_top=0.3).logits(FINAL, seen(FINAL, early))
    assert torch.equal(logits.isfinite(), F.plausibility_mask(FINAL, beta=0.3))


def test_deco_adds_the_layer_that_is_surest_of_a_candidate() -> None:
    early = torch.zeros(1, 3, 4)
    early[0, 1, 1] = 5.0  # sure of token 1, a candidate
    early[0, 2, 3] = 9.0  # surer of token 3, which is none
    logits = DeCo(alpha=0.6, top_p=1.0, top_k=3).logits(FINAL[:1], seen(FINAL[:1], early))
    weight = math.exp(5) / (math.exp(5) + 3)
    expected = torch.tensor([[2.0, 1.5 + 0.6 * weight * 5, 1.0, -math.inf]])
    torch.testing.assert_close(logits, expected)


def test_deco_without_strength_leaves_the_candidates_as_they_are() -> None:
    logits = DeCo(alpha=0.0, top_k=2, top_p=1.0).logits(FINAL, seen(FINAL, torch.zeros(0)))
    assert torch.equal(logits.isfinite().sum(dim=1), torch.tensor([2, 2]))
    assert torch.equal(logits[logits.isfinite()], FINAL[logits.isfinite()])


def test_deco_without_limits_keeps_every_token() -> None:
    final = torch.tensor([[60.0, 0.0, -60.0, -80.0]])  # probabilities that round to 1 at once
    early = torch.zeros(1, 1, 4)
    assert DeCo(top_p=1.0, top_k=None).logits(final, seen(final, early)).isfinite().all()


@pytest.mark.parametrize("norm", [True, False])
def test_sla_is_a_weighted_mean_of_the_final_and_the_early_logits(norm: bool) -> None:
    early = torch.randn(2, 3, 4)
    logits = SLA(gamma=0.3, norm=norm).logits(FINAL, seen(FINAL, early))
    sign = 1 if norm else -1
    torch.testing.assert_close(logits, 0.7 * FINAL + 0.3 * sign * early.mean(dim=1))


def test_what_several_methods_add_does_not_depend_on_their_order() -> None:
    at = seen(FINAL, torch.randn(2, 3, 4))
    sla, deco = SLA(), DeCo(top_k=None, top_p=1.0)
    forth = deco.logits(sla.logits(FINAL, at), at)
    back = sla.logits(deco.logits(FINAL, at), at)
    torch.testing.assert_close(forth, back)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_dola_decodes_as_its_formula_says_on_the_models_own_hidden_states(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    with torch.no_grad():
        output = family.model(**batch, output_hidden_states=True)
    head = family.model.get_output_embeddings()
    early = torch.stack([head(h[:, -1]) for h in output.hidden_states[1:3]], dim=1)
    expected = F.dola_logits(output.logits[:, -1], early, relative_top=0.1, divergence="jsd")
    with vlm_steer.steer(family.model, DoLa()) as steering:
        logits = generate(family, batch, max_new_tokens=1)[:, 0]
        assert steering.status()["methods"][0]["layers"] == [0, 1]
    assert torch.equal(logits.isfinite(), expected.isfinite())
    kept = expected.isfinite()
    torch.testing.assert_close(logits[kept], expected[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", [DoLa, DeCo, SLA])
def test_the_last_layer_is_no_early_layer(cls: type[DoLa | DeCo | SLA]) -> None:
    family = zoo.load("llava")
    with pytest.raises(ConfigError, match="3 layers before the last"):
        vlm_steer.attach(family.model, cls(layers=(2, 4)))


@pytest.mark.parametrize(
    ("cls", "options", "word"),
    [
        (DoLa, {"relative_top": 1.5}, "relative_top"),
        (DeCo, {"alpha": -1.0}, "alpha"),
        (DeCo, {"top_p": 0.0}, "top_p"),
        (DeCo, {"top_k": 0}, "top_k"),
        (DeCo, {"alpha": 0.0, "layers": (0.5, 0.9)}, "layers has no effect"),
        (SLA, {"gamma": 1.5}, "gamma"),
        (SLA, {"scope": "all"}, "scope has no effect"),
    ],
)
def test_options_outside_their_range_are_refused(
    cls: type, options: dict[str, object], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        cls(**options)
