"""Weights are those of scikit-learn, calibration keeps the order, files keep every bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_steer import load_tiny
from vlm_steer.detection import (
    Calibrator,
    FittedDetector,
    Training,
    build_detector,
    fit_calibrator,
    fit_logistic,
    fit_network,
    fit_residual,
    list_detectors,
    made_for,
)
from vlm_steer.detection.fitting import choose_strength, group_folds
from vlm_steer.errors import ConfigError, DataError


@pytest.fixture
def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve features, of which the first three carry the label."""
    x = torch.randn(400, 12, dtype=torch.float64)
    logits = x @ torch.tensor([2.0, -1.5, 1.0] + [0.0] * 9, dtype=torch.float64) - 1
    return x * 3 + 5, (torch.rand(400) < logits.sigmoid()).long()


@pytest.mark.parametrize("is_balanced", [False, True])
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_weights_are_those_of_scikit_learn(planted, strength, is_balanced):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = planted
    theirs = linear_model.LogisticRegression(
        C=strength,
        class_weight="balanced" if is_balanced else None,
        max_iter=20_000,
        tol=1e-10,
    ).fit(x.numpy(), y.numpy())
    mine = fit_logistic(x, y, strength=strength, standardise=False, is_balanced=is_balanced)
    torch.testing.assert_close(mine.coef, torch.tensor(theirs.coef_[0]), atol=2e-5, rtol=0)
    probability = torch.tensor(theirs.predict_proba(x.numpy())[:, 1])
    torch.testing.assert_close(mine.logits(x).sigmoid(), probability, atol=1e-5, rtol=0)


def test_scaling_a_feature_changes_no_standardised_fit(planted):
    x, y = planted
    other = x * torch.logspace(-3, 3, 12) + 7
    torch.testing.assert_close(
        fit_logistic(x, y).logits(x), fit_logistic(other, y).logits(other), atol=1e-5, rtol=0
    )


def test_principal_components_are_folded_into_the_weights(planted):
    x, y = planted
    mixed = torch.cat([x, x @ torch.randn(12, 20, dtype=torch.float64)], dim=1)
    few = fit_logistic(mixed, y, components=12, strength=1e6)
    every = fit_logistic(x, y, strength=1e6)
    assert few.coef.shape == (32,)
    torch.testing.assert_close(few.logits(mixed), every.logits(x), atol=1e-2, rtol=0)


def test_the_strength_is_chosen_on_images_that_were_left_out(planted):
    x, y = planted
    groups = [f"image {i // 4}" for i in range(400)]
    folds = group_folds(groups, 5)
    assert all(len(set(folds[i : i + 4].tolist())) == 1 for i in range(0, 400, 4))
    noise = torch.randn(400, 60, dtype=torch.float64)
    assert choose_strength(noise, y, groups) < choose_strength(x, y, groups)


@pytest.mark.parametrize("kind", ["platt", "temperature", "isotonic"])
def test_a_calibrated_risk_is_a_probability_in_the_same_order(kind):
    probability = torch.rand(3000, dtype=torch.float64)
    labels = (torch.rand(3000) < probability).long()
    risk = 4 * torch.special.logit(probability, eps=1e-6) + (3 if kind != "temperature" else 0)
    calibrated = fit_calibrator(kind, risk, labels)(risk)
    assert (calibrated - probability).abs().mean() < 0.03
    assert (calibrated[risk.argsort()].diff() >= -1e-12).all()


def test_what_cannot_be_fitted_is_refused(planted):
    x, y = planted
    with pytest.raises(DataError, match="0 hallucinated and 400 grounded"):
        fit_logistic(x, torch.zeros(400))
    with pytest.raises(DataError, match="3 hallucinated"):
        fit_logistic(x[:20], torch.tensor([1.0] * 3 + [0.0] * 17))
    x[3, 2] = torch.nan
    with pytest.raises(DataError, match="row 3, column 2"):
        fit_logistic(x, y)
    with pytest.raises(DataError, match="3 features were given to weights for 12"):
        fit_logistic(x.nan_to_num(), y).logits(x[:, :3].nan_to_num())


@pytest.mark.parametrize("classifier", ["logistic", "mlp"])
def test_a_saved_detector_is_the_same_bit_for_bit(planted, tmp_path, classifier):
    x, y = planted
    words = torch.arange(400).remainder(50).double()
    detector = build_detector("svar", {"heads": "each", "layers": [0, 2]})
    residual = fit_residual(x, words)
    left = residual(x, words)
    fitted = (
        fit_logistic(left, y)
        if classifier == "logistic"
        else fit_network(left, y, Training(4, epochs=2))
    )
    calibrator = fit_calibrator("isotonic", fitted.logits(left), y)
    model, processor = load_tiny()
    about = made_for(model, processor)
    saved = FittedDetector(detector, fitted, calibrator, 0.4, about, residual=residual)
    saved = saved.at_base_rate(0.1)
    saved.save_pretrained(tmp_path)
    loaded = FittedDetector.from_pretrained(tmp_path, model, processor)
    assert loaded.detector == detector
    assert loaded.risk_of(x, words).equal(saved.risk_of(x, words))
    assert loaded.threshold == saved.threshold
    assert loaded.calibrator.base_rate == 0.1
    with pytest.raises(ConfigError, match="give words"):
        loaded.risk_of(x)


def test_detectors_of_the_first_format_are_read_and_those_of_later_ones_refused(planted, tmp_path):
    x, y = planted
    FittedDetector(build_detector("svar", {"heads": "each"}), fit_logistic(x, y)).save_pretrained(
        tmp_path
    )
    path = tmp_path / "detector.json"
    about = json.loads(path.read_text())
    del about["classifier"], about["fitted_rate"], about["base_rate"]
    path.write_text(json.dumps({**about, "format": "vlm_steer.detector/1"}))
    assert FittedDetector.from_pretrained(tmp_path).risk_of(x).equal(fit_logistic(x, y).logits(x))
    path.write_text(json.dumps({**about, "format": "vlm_steer.detector/3"}))
    with pytest.raises(DataError, match="this version of vlm-steer reads"):
        FittedDetector.from_pretrained(tmp_path)
    path.write_text(json.dumps({**about, "format": "vlm_steer.detector/2", "classifier": "tree"}))
    with pytest.raises(DataError, match="'tree' is unknown"):
        FittedDetector.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", ["layers", "heads", "chat_template", "cue", "family"])
def test_a_detector_of_another_model_or_template_is_refused(field, tmp_path):
    model, processor = load_tiny()
    FittedDetector(build_detector("position"), made_for=made_for(model, processor)).save_pretrained(
        tmp_path
    )
    path = tmp_path / "detector.json"
    about = json.loads(path.read_text())
    about["made_for"][field] = "other"
    path.write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=f"{field} other instead of"):
        FittedDetector.from_pretrained(tmp_path, model, processor)
    with pytest.warns(match="another model or template"):
        FittedDetector.from_pretrained(tmp_path, model, processor, strict=False)


def test_damaged_files_and_unknown_names_are_told(tmp_path):
    with pytest.raises(DataError, match=r"detector\.json"):
        FittedDetector.from_pretrained(tmp_path)
    FittedDetector(build_detector("entropy")).save_pretrained(tmp_path)
    (tmp_path / "detector.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(DataError, match="damaged"):
        FittedDetector.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'entropy'"):
        build_detector("entropi")
    with pytest.raises(ConfigError, match="no option 'layer'"):
        build_detector("svar", {"layer": 3})
    with pytest.raises(ConfigError, match="pool is 'last'"):
        build_detector("svar", {"pool": "last"})
    assert {"position", "svar", "lookback_ratio"} <= set(list_detectors())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("made_for", [1]),
        ("made_for", None),
        ("made_of", None),
        ("options", None),
        ("detector", None),
        ("classifier", ["logistic"]),
        ("calibrator", {}),
        ("threshold", "high"),
        ("base_rate", 7),
        ("fitted_rate", "rare"),
    ],
)
def test_a_file_with_a_wrong_value_is_no_detector(planted, tmp_path, key, value):
    x, y = planted
    weights = fit_logistic(x, y)
    calibrator = fit_calibrator("platt", weights.logits(x), y)
    FittedDetector(build_detector("svar"), weights, calibrator, 0.5).save_pretrained(tmp_path)
    path = tmp_path / "detector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=rf"no whole detector \({key}: .*Fit it again"):
        FittedDetector.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"), [("coef", (5,)), ("mean", (5,)), ("calibrator", (7,)), ("intercept", (2, 3))]
)
def test_weights_that_do_not_fit_each_other_are_damaged(planted, tmp_path, name, shape):
    x, y = planted
    weights = fit_logistic(x, y)
    calibrator = fit_calibrator("platt", weights.logits(x), y)
    FittedDetector(build_detector("svar"), weights, calibrator).save_pretrained(tmp_path)
    path = tmp_path / "detector.safetensors"
    save_file({**load_file(path), name: torch.ones(shape)}, path)
    with pytest.raises(DataError, match="is damaged: its weights"):
        FittedDetector.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["platt", "temperature", "isotonic"])
def test_another_base_rate_moves_every_odds_by_the_same_factor(planted, kind):
    x, y = planted
    logistic = fit_logistic(x, y)
    risk = logistic.logits(x)
    calibrator = fit_calibrator(kind, risk, y)
    rate = float(y.double().mean())
    assert calibrator.fitted_rate == pytest.approx(rate)
    detector = FittedDetector(build_detector("svar"), logistic, calibrator, 0.4)
    rare = detector.at_base_rate(0.05)
    old, new = detector.risk_of(x), rare.risk_of(x)
    factor = (0.05 / 0.95) / (rate / (1 - rate))
    inner = (old > 0) & (old < 1)
    expected = factor * old[inner] / (1 - old[inner])
    torch.testing.assert_close(new[inner] / (1 - new[inner]), expected)
    assert (new > rare.threshold).equal(old > detector.threshold)
    back = rare.at_base_rate(rate)
    torch.testing.assert_close(back.risk_of(x), old)
    assert back.threshold == pytest.approx(0.4)


def test_a_base_rate_that_cannot_be_is_refused(planted):
    x, y = planted
    calibrator = fit_calibrator("platt", x[:, 0], y)
    detector = FittedDetector(build_detector("entropy"), calibrator=calibrator)
    for rate in (0.0, 1.0, 7.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            detector.at_base_rate(rate)
    with pytest.raises(ConfigError, match="no probabilities"):
        FittedDetector(build_detector("entropy")).at_base_rate(0.1)
    unknown = Calibrator("platt", torch.ones(2).double())
    with pytest.raises(ConfigError, match="what share of units"):
        FittedDetector(build_detector("entropy"), calibrator=unknown).at_base_rate(0.1)


def test_a_risk_that_points_the_wrong_way_is_calibrated_to_the_base_rate(planted):
    x, y = planted
    risk = -fit_logistic(x, y).logits(x)
    probability = fit_calibrator("platt", risk, y)(risk)
    torch.testing.assert_close(probability, y.double().mean().expand(400))
