"""Contrasts as a logits processor in plain transformers code."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.settings import heads_for
from tests.contract.test_contract import hooks_of_ours, two_rows
from tests.families import zoo
from vlm_steer.errors import SteerError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

SPECS = {
    "vcd": {"method": "vcd", "alpha": 0.5},
    "m3id": {"method": "m3id", "lam": 0.3, "confidence": 1.0},
    "icd": {"method": "icd", "disturbance_ids": [30, 40]},
    "sid": {"method": "sid", "keep": 0.3},
    "guidance": {"method": "pai", "alpha": 0.0, "gamma": 1.5},
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
}


def generate(family: zoo.Family, batch: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    tokens: Tensor = family.model.generate(**batch, max_new_tokens=6, **options)
    return tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", SPECS)
def test_three_back_ends_give_the_same_tokens(spec: str, way: str) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    contrast = vlm_steer.LogitsProcessor(family.model, SPECS[spec], batch)
    plain = generate(family, batch, logits_processor=[contrast], **WAYS[way])
    for backend in ("auto", "separate"):
        with vlm_steer.steer(family.model, SPECS[spec], backend=backend):  # type: ignore[arg-type]
            assert torch.equal(generate(family, batch, **WAYS[way]), plain)
    assert not torch.equal(generate(family, batch, **WAYS[way]), plain)


def test_a_stream_that_would_share_the_users_prompt_passes_it_by_itself() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    spec = {"method": "decore", "head_file": heads_for("llava"), "n_heads": 3, "alpha": 4.0}
    contrast = vlm_steer.LogitsProcessor(family.model, spec, batch)
    plain = generate(family, batch, logits_processor=[contrast], do_sample=False)
    with vlm_steer.steer(family.model, spec):
        assert torch.equal(generate(family, batch, do_sample=False), plain)
    assert not torch.equal(generate(family, batch, do_sample=False), plain)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "mllama", "instructblip"])
def test_other_families_give_the_same_tokens(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    contrast = vlm_steer.LogitsProcessor(family.model, "vcd", batch)
    plain = generate(family, batch, logits_processor=[contrast], do_sample=False)
    with vlm_steer.steer(family.model, "vcd"):
        assert torch.equal(generate(family, batch, do_sample=False), plain)


def test_one_processor_serves_one_generation_after_the_other_and_leaves_no_trace() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    base = generate(family, batch, do_sample=False)
    contrast = vlm_steer.LogitsProcessor(family.model, "vcd", batch)
    first = generate(family, batch, logits_processor=[contrast], do_sample=False)
    assert torch.equal(generate(family, batch, logits_processor=[contrast], do_sample=False), first)
    assert torch.equal(generate(family, batch, do_sample=False), base)
    assert hooks_of_ours(family.model) == []
    assert "generate" not in vars(family.model)


def test_methods_that_act_inside_the_model_are_refused_by_name() -> None:
    family = zoo.load("llava")
    for spec, hook in (("pai", "scores"), ("avisc", "choose"), ("vhr", "heads")):
        with pytest.raises(UnsupportedModelError, match=f"{spec} acts inside the model .*{hook}"):
            vlm_steer.LogitsProcessor(family.model, spec, two_rows(family))


def test_another_prompt_is_refused() -> None:
    family = zoo.load("llava")
    contrast = vlm_steer.LogitsProcessor(family.model, "vcd", two_rows(family))
    other = family.batch([family.inputs(n_text=3)])
    with pytest.raises(SteerError, match="was made for prompts"):
        generate(family, other, logits_processor=[contrast], do_sample=False)
