"""What was made on one model is refused on another of the same shape, and on no copy of its own."""

import json
from typing import Any

import pytest
import torch

from vlm_steer import load_tiny
from vlm_steer.calibration import (
    are_other_weights,
    read_calibration,
    weights_sample,
    write_calibration,
)
from vlm_steer.detection import FittedDetector, build_detector, made_for
from vlm_steer.directions import Directions
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import ConfigError
from vlm_steer.methods.guided_decoding import GuidedDecoding


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_tiny()


@pytest.fixture(scope="module")
def other() -> Any:
    """A model of the same shape that was not trained from the same weights."""
    model, _ = load_tiny()
    with torch.no_grad():
        matrix = model.get_input_embeddings().weight
        matrix.copy_(
            matrix[torch.randperm(len(matrix), generator=torch.Generator().manual_seed(0))]
        )
    return model


def test_a_detector_is_refused_on_other_weights(loaded, other, tmp_path):
    model, processor = loaded
    made = FittedDetector(build_detector("svar"), made_for=made_for(model, processor))
    made.save_pretrained(tmp_path)
    FittedDetector.from_pretrained(tmp_path, model, processor)
    with pytest.raises(ConfigError, match=r"another model or template: other weights\. Fit it"):
        FittedDetector.from_pretrained(tmp_path, other, processor)
    with pytest.warns(match="other weights"):
        FittedDetector.from_pretrained(tmp_path, other, processor, strict=False)


def test_guided_decoding_refuses_a_detector_of_other_weights(loaded, other, tmp_path):
    detector = build_detector("lookback_ratio")
    FittedDetector(detector, made_for=made_for(*loaded)).save_pretrained(tmp_path)
    method = GuidedDecoding(detector=str(tmp_path))
    method.resolve(inspect_model(loaded[0]))
    with pytest.raises(ConfigError, match="another model: other weights"):
        method.resolve(inspect_model(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_copy_is_the_same_model(dtype):
    # Values that bfloat16 does not hold exactly, of every size.
    exact, _ = load_tiny()
    with torch.no_grad():
        matrix = exact.get_input_embeddings().weight
        matrix.copy_(matrix * torch.logspace(-9, 0, matrix.numel()).view_as(matrix))
    known = weights_sample(inspect_model(exact))
    here = weights_sample(inspect_model(exact.to(dtype)))
    assert known != here
    assert not are_other_weights(known, here)


def test_an_adapted_model_counts_as_its_base(loaded):
    peft = pytest.importorskip("peft")
    model, processor = load_tiny()
    targets = ["embed_tokens", "q_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, use_dora=True))
    assert made_for(adapted, processor)["weights"] == made_for(*loaded)["weights"]


def test_weights_that_are_not_in_memory_or_packed_are_not_compared(loaded):
    known = weights_sample(inspect_model(loaded[0]))
    elsewhere, processor = load_tiny()
    assert "weights" not in made_for(elsewhere.to("meta"), processor)
    packed, _ = load_tiny()
    codes = torch.zeros(4, dtype=torch.uint8)
    packed.get_input_embeddings().weight = torch.nn.Parameter(codes, requires_grad=False)
    broken, _ = load_tiny()
    broken.get_input_embeddings().weight.data.fill_(torch.nan)
    for model in (elsewhere, packed, broken):
        here = weights_sample(inspect_model(model))
        assert here is None
        assert not are_other_weights(known, here)


def test_a_detector_that_names_no_weights_is_accepted(loaded, other, tmp_path):
    model, processor = loaded
    about = made_for(model, processor)
    del about["weights"]
    FittedDetector(build_detector("svar"), made_for=about).save_pretrained(tmp_path)
    FittedDetector.from_pretrained(tmp_path, other, processor)


@pytest.mark.parametrize("damaged", ["0.1", [0.1], ["a"] * 16, [None] * 16, {}])
def test_a_damaged_sample_is_that_of_other_weights(loaded, damaged):
    assert are_other_weights(damaged, weights_sample(inspect_model(loaded[0])))


def test_a_calibration_is_refused_on_other_weights(loaded, other, tmp_path):
    path, info = tmp_path / "heads.json", inspect_model(loaded[0])
    write_calibration(path, "act", info, {"heads": {"0": [1]}})
    assert read_calibration(path, "act", info)["heads"] == {"0": [1]}
    with pytest.raises(ConfigError, match=r"another model: other weights\. Make it with"):
        read_calibration(path, "act", inspect_model(other))
    content = json.loads(path.read_text())
    del content["model"]["weights"]
    path.write_text(json.dumps(content))
    assert read_calibration(path, "act", inspect_model(other))["heads"] == {"0": [1]}
    del content["model"]["layers"]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="unknown layers"):
        read_calibration(path, "act", info)


def test_directions_are_refused_on_other_weights(loaded, other, tmp_path):
    info = inspect_model(loaded[0])
    vectors = torch.ones(info.n_layers, int(info.text_config.hidden_size))
    path = tmp_path / "d.safetensors"
    Directions(vectors, "vti", info.family, {}, weights=weights_sample(info)).save(path)
    Directions.load(path).check("vti", info)
    with pytest.raises(ConfigError, match="with other weights"):
        Directions.load(path).check("vti", inspect_model(other))
    Directions(vectors, "vti", info.family, {}).save(path)
    Directions.load(path).check("vti", inspect_model(other))
