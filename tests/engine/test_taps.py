"""Early layers read as the model itself would read them."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import generate, two_rows
from tests.families import zoo
from vlm_steer.engine.hooks import At, Branch, LogitsAt, Method
from vlm_steer.engine.model import ModelInfo, inspect_model
from vlm_steer.errors import SteerError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")


@dataclass(frozen=True, kw_only=True)
class Tapped(Method):
    """Taps every layer and keeps what it sees."""

    with_branch: bool = False
    seen: list[LogitsAt] = field(default_factory=list)

    def select_taps(self, model: ModelInfo) -> tuple[int, ...]:
        return self.select_layers(model)

    def branches(self) -> tuple[Branch, ...]:
        flipped = Branch("flipped", pixels=lambda pixels, sizes: pixels.flip(-1))
        return (flipped,) if self.with_branch else ()

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        self.seen.append(at)
        return logits


@dataclass(frozen=True, kw_only=True)
class Late(Method):
    """Acts from the third token on, as methods do that wait until the model is unsure."""

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        return logits.flip(-1) if at.step >= 2 else logits


@dataclass(frozen=True, kw_only=True)
class Doubled(Method):
    rows = "all"

    def hidden(self, hidden: Tensor, at: At) -> Tensor:
        return hidden * 2.0 if at.layer == 1 else hidden


@dataclass(frozen=True, kw_only=True)
class ReadsInside(Method):
    """Reads logits in the middle of a forward."""

    needs_readout = True
    seen: list[Tensor] = field(default_factory=list)

    def hidden(self, hidden: Tensor, at: At) -> Tensor:
        if at.layer == at.n_layers - 1:
            self.seen.append(at.to_logits(hidden[:, -1]))
        return hidden


for _cls in (Tapped, Late, Doubled, ReadsInside):
    _cls.name = _cls.__name__.lower()


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_last_layer_read_early_is_the_models_own_answer(name: str) -> None:
    family = zoo.load(name)
    method = Tapped()
    with vlm_steer.steer(family.model, method):
        logits = generate(family, two_rows(family))
    assert len(method.seen) == logits.shape[1]
    for step, at in enumerate(method.seen):
        early = at.early_logits()
        assert early.shape == (2, zoo.LAYERS, zoo.VOCAB)
        assert early.dtype == torch.float32
        torch.testing.assert_close(early[:, -1], logits[:, step].float(), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(early[:, 0], early[:, -1], atol=1e-2)


def test_taps_are_the_hidden_states_that_the_model_reports() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    method = Tapped()
    with torch.no_grad():
        states = family.model(**batch, output_hidden_states=True).hidden_states
        with vlm_steer.steer(family.model, method):
            family.model(**batch)
    tapped = method.seen[0].tapped[None]
    assert torch.equal(tapped[:, :-1], torch.stack([s[:, -1] for s in states[1:-1]], dim=1))
    head = family.model.get_output_embeddings()
    torch.testing.assert_close(method.seen[0].early_logits(normed=False), head(tapped).float())
    for normed in (True, False):
        each, mean = (method.seen[0].early_logits(normed=normed, mean=m) for m in (False, True))
        torch.testing.assert_close(mean, each.mean(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["paired", "separate"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mllama"])
def test_branches_have_taps_of_their_own(name: str, backend: str) -> None:
    family = zoo.load(name)
    method = Tapped(with_branch=True)
    with vlm_steer.steer(family.model, method, backend=backend):
        generate(family, two_rows(family))
    assert len(method.seen) > 1
    for at in method.seen:
        mine, theirs = at.early_logits(), at.early_logits(branch="flipped")
        torch.testing.assert_close(mine[:, -1], at.raw, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(theirs[:, -1], at.branches["flipped"], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(mine, theirs, atol=1e-3)


def test_taps_see_what_hidden_hooks_made_of_a_layer() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    plain, edited = Tapped(), Tapped()
    with vlm_steer.steer(family.model, plain):
        generate(family, batch, max_new_tokens=1)
    with vlm_steer.steer(family.model, [Doubled(), edited]):
        generate(family, batch, max_new_tokens=1)
    before, after = plain.seen[0].tapped[None], edited.seen[0].tapped[None]
    assert torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(after[:, 1], 2 * before[:, 1])


@pytest.mark.filterwarnings("error::vlm_steer.errors.SteerWarning")
def test_a_change_that_comes_late_is_no_silent_one() -> None:
    family = zoo.load("llava")
    with vlm_steer.steer(family.model, Late()) as steering:
        generate(family, two_rows(family), max_new_tokens=4)
    assert steering.effect()["late"]["probability_moved"] > 0


@pytest.mark.parametrize("asked_before", [False, True])
def test_hidden_states_that_the_model_reports_are_the_edited_ones(asked_before: bool) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    with torch.inference_mode():
        if asked_before:
            family.model(**batch, output_hidden_states=True)
        with vlm_steer.steer(family.model, Tapped()):
            plain = family.model(**batch, output_hidden_states=True).hidden_states
        with vlm_steer.steer(family.model, Doubled()):
            edited = family.model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(edited[2][:, -1], 2 * plain[2][:, -1])


def test_a_skipped_cross_attention_layer_leaves_the_state_of_the_one_before() -> None:
    family = zoo.load("mllama")
    batch = family.batch([family.inputs(images=0)])
    method = Tapped()
    with vlm_steer.steer(family.model, method):
        generate(family, batch)
    cross = {s.layer for s in inspect_model(family.model).sites.values() if s.axis == "cross"}
    assert cross
    for at in method.seen:
        torch.testing.assert_close(at.early_logits()[:, -1], at.raw, atol=1e-4, rtol=1e-4)
        for layer in cross:
            assert torch.equal(at.tapped[None][:, layer], at.tapped[None][:, layer - 1])


def test_only_the_layers_asked_for_are_kept() -> None:
    family = zoo.load("llava")
    method = Tapped(layers=(1, 3))
    with vlm_steer.steer(family.model, method):
        generate(family, two_rows(family), max_new_tokens=2)
    assert all(at.tapped[None].shape[1] == 2 for at in method.seen)


def test_logits_can_be_read_in_the_middle_of_a_forward() -> None:
    family = zoo.load("gemma3")
    method = ReadsInside()
    with vlm_steer.steer(family.model, method):
        logits = generate(family, two_rows(family))
    seen = torch.stack(method.seen, dim=1)
    torch.testing.assert_close(seen, logits.float(), atol=1e-4, rtol=1e-4)


def test_methods_that_declared_no_taps_cannot_read_early_logits() -> None:
    family = zoo.load("llava")

    class Undeclared(Tapped):
        def select_taps(self, model: ModelInfo) -> tuple[int, ...]:
            return ()

        def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
            return at.to_logits(logits)

    with (
        vlm_steer.steer(family.model, Undeclared()),
        pytest.raises(SteerError, match="without taps"),
    ):
        generate(family, two_rows(family))


@pytest.mark.parametrize("cap", [2.0, None])
def test_a_soft_cap_of_the_family_is_part_of_the_readout(cap: float | None) -> None:
    family = zoo.load("paligemma")
    family.model.config.get_text_config().final_logit_softcapping = cap
    method = Tapped()
    with vlm_steer.steer(family.model, method):
        logits = generate(family, two_rows(family))
    if cap is not None and float(logits.abs().max()) > cap:
        pytest.skip("this release of transformers does not cap the logits of PaliGemma")
    readout = inspect_model(family.model).readout
    assert readout.cap == cap
    states = torch.randn(2, 3, zoo.HIDDEN)
    torch.testing.assert_close(readout(states, mean=True), readout(states).mean(1, keepdim=True))
    torch.testing.assert_close(
        method.seen[0].early_logits()[:, -1], logits[:, 0].float(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_factor_on_the_logits_is_found_in_the_configuration(factor: float) -> None:
    family = zoo.load("llava")

    class Scaled(type(family.model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / factor
            return output

    family.model.__class__ = Scaled
    family.model.config.get_text_config().logits_scaling = factor
    assert inspect_model(family.model).readout.scale == 1 / factor


def test_a_model_that_reads_its_logits_otherwise_is_refused_when_attaching() -> None:
    family = zoo.load("llava")

    class Odd(type(family.model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + output.logits.roll(1, dims=-1)
            return output

    family.model.__class__ = Odd
    for method in (Tapped(), ReadsInside()):
        with pytest.raises(UnsupportedModelError, match="final norm and output head"):
            vlm_steer.attach(family.model, method)
    assert "generate" not in vars(family.model)


def test_finding_the_readout_leaves_the_model_as_it_was() -> None:
    family = zoo.load("qwen2_5_vl")
    batch = two_rows(family)
    base = generate(family, batch)
    with vlm_steer.steer(family.model, Tapped()):
        assert torch.equal(generate(family, batch), base)
    assert torch.equal(generate(family, batch), base)
    assert not [m for m in family.model.modules() if m._forward_hooks and "norm" in str(m)]
