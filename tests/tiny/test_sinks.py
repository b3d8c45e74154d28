"""The extra stage that grows attention sinks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm_steer.tiny import model_dir
from vlm_steer.tiny.training import sinks
from vlm_steer.tiny.training.loop import Recipe, Run, train


def test_attention_is_missing_until_every_head_leaves_enough_on_sinks() -> None:
    is_text = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    is_blank = torch.tensor([[False, True, False, False]])
    enough = torch.tensor([0.4, 0.2, 0.2, 0.2]).expand(1, 2, 4, 4)
    assert sinks._missing_attention(enough, is_text, is_blank) == 0
    less = enough.clone()
    less[0, 1, 3] = torch.tensor([0.15, 0.06, 0.4, 0.39])  # half of both aims, in one head of two
    missing = sinks._missing_attention(less, is_text, is_blank)
    assert float(missing) == pytest.approx(2 * 0.5 * torch.log(torch.tensor(2.0)).item())


def test_mass_is_missing_at_sinks_and_in_excess_elsewhere() -> None:
    hidden = torch.randn(1, 3, 192)
    hidden[..., sinks._DIMENSION] = 0
    is_sink = torch.tensor([[True, False, False]])
    is_token = torch.ones(1, 3, dtype=torch.bool)
    assert float(sinks._missing_mass(hidden, is_sink, is_token)) == pytest.approx(1)
    hidden[0, 0, sinks._DIMENSION] = 100
    assert sinks._missing_mass(hidden, is_sink, is_token) == 0
    hidden[0, 1, sinks._DIMENSION] = 100
    assert sinks._missing_mass(hidden, is_sink, is_token) > 0


@pytest.mark.slow
def test_updates_from_a_finished_model_raise_attention_to_its_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks.Sinks, "images", 2)
    torch.set_num_threads(1)
    recipe = Recipe(steps=(0, 0, 0, 0), sinks=6, start=str(model_dir()))
    grown = train(recipe, Run(tmp_path, torch.device("cpu"), workers=0))
    before, after = (load_file(folder / "model.safetensors") for folder in (model_dir(), grown))
    moved = {n for n in before if not torch.equal(before[n], after[n].to(before[n].dtype))}
    assert moved
    assert not any("vision_tower" in name for name in moved)
    assert _attention_to_first(str(grown)) > _attention_to_first(str(model_dir()))


def _attention_to_first(folder: str) -> float:
    from vlm_steer.loading import load_model

    model, _ = load_model(folder)
    model.set_attn_implementation("eager")
    text = torch.arange(20, 60)[None]
    text[0, 0] = 1
    with torch.no_grad():
        seen = model(input_ids=text, output_attentions=True)
    return float(torch.stack(seen.attentions[2:])[..., 0].mean())
