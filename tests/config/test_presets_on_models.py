"""Every preset on the model it is for, shrunken in everything but what the preset names."""

import functools
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vlm_steer
from tests.families import zoo
from vlm_steer._yaml import read_yaml
from vlm_steer.config import list_presets, resolve
from vlm_steer.engine.selectors import select
from vlm_steer.errors import ConfigError, SteerError
from vlm_steer.registry import list_methods

CONFIGS = Path(__file__).parents[2] / "configs"

DEPTH_OF = {
    "act_official": ("llava", 32),
    "deco_llava": ("llava", 32),
    "dola_official": ("llava", 32),
    "gift_llava_7b": ("llava", 32),
    "gift_llava_13b": ("llava", 40),
    "gift_qwen2_vl": ("qwen2_vl", 28),
    "memvr_glm_4v": (
        "llava",
        40,
    ),  # GLM-4V and Qwen-VL live outside transformers; their depth counts
    "memvr_official": ("llava", 32),
    "memvr_qwen_vl": ("llava", 32),
    "pai_official": ("llava", 32),
    "paint_official": ("llava", 32),
    "sid_captions": ("llava", 32),
    "sid_official": ("llava", 32),
    "spin_llava_13b": ("llava", 40),
    "spin_official": ("llava", 32),
    "spin_pope": ("llava", 32),
    "spin_qwen_vl": ("llava", 32),
    "vaf_llava": ("llava", 32),
    "var_official": ("llava", 32),
    "vhr_instructblip": ("instructblip", 32),
    "vhr_llava_7b": ("llava_next", 32),
    "vista_llava": ("llava", 32),
}
"""Preset with layers by number -> family and decoder layers of the model that its text names."""

WIDTH_OF = {"var_llava_7b": 4096, "var_llava_13b": 5120}
"""Preset with dimensions by number -> hidden size of that model."""

REFUSED = {
    "decore": "head_file",
    "decore_official": "head_file",
    "vti": "directions",
    "agla": "processor",
    "icd": "processor",
    "icd_official": "processor",
    "icd_vcd": "processor",
    "lqcd": "processor",
    "mvp": "processor",
    "halc": "processor",
    "halc_official": "processor",
    "yes_bias": "processor",
    "vdgd": "processor",
    "vdgd_official": "processor",
}
"""Preset -> what it asks for, in the message, before it can be put on any model."""


@functools.cache
def _model(family, n_layers, width=None):
    config = zoo._recipe(family).config.__class__.from_dict(zoo._recipe(family).config.to_dict())
    text = config.get_text_config()
    text.num_hidden_layers = n_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1] * n_layers
    if width is not None:
        text.hidden_size = width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config).eval()


def _by_number(value):
    """Whether a selector or a layer holds a whole number above 0."""
    if isinstance(value, dict):
        return any(_by_number(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_by_number(inner) for inner in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _names_layers(preset):
    written, _ = read_yaml(CONFIGS / f"{preset}.yaml")
    return any(
        _by_number(options.get(name))
        for options in written["methods"]
        for name in ("layers", "early", "gaze_layer")
    )


def test_every_preset_with_layers_by_number_says_for_which_model():
    of_a_model = {name for name in list_presets() if name not in list_methods()}
    assert {name for name in of_a_model if _names_layers(name)} <= set(DEPTH_OF)


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_fits_the_model_it_is_for(preset):
    if preset in WIDTH_OF:
        model = _model("llava", 2, WIDTH_OF[preset])
    else:
        model = _model(*DEPTH_OF.get(preset, ("llava", 32)))
    if preset in REFUSED:
        with pytest.raises(SteerError, match=REFUSED[preset]):
            vlm_steer.attach(model, preset)
        return
    vlm_steer.attach(model, preset).detach()


@pytest.mark.parametrize(
    "preset", ["deco_llava", "gift_llava_13b", "spin_llava_13b", "vhr_llava_7b"]
)
def test_layers_by_number_are_refused_where_the_model_has_fewer(preset):
    with pytest.raises(ConfigError, match=r"reach outside this model, which has [78] layers"):
        vlm_steer.attach(_model("llava", 8), preset)


def test_the_page_of_presets_names_every_preset_of_a_model():
    page = (CONFIGS.parent / "docs" / "presets.md").read_text()
    assert [name for name in (*DEPTH_OF, *WIDTH_OF) if f"`{name}`" not in page] == []


def test_the_page_of_presets_scales_layers_as_the_methods_do():
    page = (CONFIGS.parent / "docs" / "presets.md").read_text()
    rows = re.findall(r"\| (\d+) ((?:\| \d+–\d+ ){4})\|", page)
    assert {depth for depth, _ in rows} == {"28", "32", "36"}
    for depth, cells in rows:
        written = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)–(\d+)", cells)]
        for name, ends in zip(("pai", "vaf", "deco", "gift"), written, strict=True):
            (method,) = resolve(name)
            chosen = select(method.layers, int(depth) - (name == "deco"))
            assert (chosen[0], chosen[-1]) == ends, (name, depth)
