"""A new method is one Python file and one YAML file, as docs/contributing.md says."""

import importlib
import json
import sys

import pytest
import torch

import vlm_steer
import vlm_steer.methods
from tests.packaging.test_project import ROOT, blocks
from vlm_steer import config, registry
from vlm_steer.commands import catalog
from vlm_steer.config import apply_overrides, dump, find_preset, resolve

PAGE = ROOT / "docs" / "contributing.md"


@pytest.fixture
def gain(tmp_path, monkeypatch):
    """The two files of the page, where methods and configurations lie."""
    vlm_steer.list_methods()
    (source,) = (text for text in blocks(PAGE, "python") if "register_method" in text)
    (text,) = (text for text in blocks(PAGE, "yaml") if "method: gain" in text)
    (tmp_path / "methods").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "methods" / "gain.py").write_text(source)
    (tmp_path / "configs" / "gain.yaml").write_text(text)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(
        vlm_steer.methods, "__path__", [*vlm_steer.methods.__path__, str(tmp_path / "methods")]
    )
    monkeypatch.setattr(config, "configs_folder", lambda: tmp_path / "configs")
    registry._discovered.clear()
    importlib.invalidate_caches()
    yield
    sys.modules.pop("vlm_steer.methods.gain", None)


@pytest.mark.usefixtures("gain")
def test_the_method_of_the_contributing_page_is_found_and_described():
    assert "gain" in vlm_steer.list_methods()
    entry = catalog.entry("gain")
    assert entry.summary == "Louder heads: multiply the output of every head"
    assert (entry.hooks, entry.cost) == (("heads",), "one product per head")
    assert [option.doc for option in entry.options if not option.doc] == []
    assert "| `gain` |" in catalog.markdown_table()


@pytest.mark.usefixtures("gain")
def test_its_file_equals_its_defaults_and_survives_a_round_trip():
    methods = resolve(find_preset("gain"))
    assert methods == (vlm_steer.get_method("gain")(),)
    assert resolve(json.loads(json.dumps(dump(methods)))) == methods


@pytest.mark.usefixtures("gain")
def test_it_steers_a_model_and_leaves_no_trace():
    from vlm_steer.generation import encode, render_prompt
    from vlm_steer.tiny import load_tiny, scenes

    model, processor = load_tiny()
    image = scenes.render(scenes.scene("iid", 0))
    inputs = encode(processor, [render_prompt(processor, "What is here?")], [image])
    with torch.inference_mode():
        before = model(**inputs).logits
        with vlm_steer.steer(model, apply_overrides(resolve("gain"), ["alpha=2.0"])) as steering:
            during = model(**inputs).logits
        after = model(**inputs).logits
    assert set(steering.effect()["gain"]["layers"]) == set(range(6))
    assert not torch.equal(before, during)
    assert torch.equal(before, after)
