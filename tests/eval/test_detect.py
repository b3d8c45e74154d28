"""Detectors are judged on images they have not seen, beside what a word's place tells alone."""

import copy
import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlm_steer import cli
from vlm_steer.detection import FittedDetector, Training, Unit, build_detector
from vlm_steer.detection.pickles import convert_lookback
from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.benchmarks.chair import TableNormaliser
from vlm_steer_eval.benchmarks.vocabulary import ObjectVocabulary
from vlm_steer_eval.detection.command import parse_detectors
from vlm_steer_eval.detection.data import Collected, Settings, collect, split_images
from vlm_steer_eval.detection.drop import (
    Dropping,
    cut_short,
    drop_curves,
    without_risky_sentences,
)
from vlm_steer_eval.detection.labels import labelled_texts, mention_units
from vlm_steer_eval.detection.run import Recipe, evaluate, fit, refuse_leakage, table
from vlm_steer_eval.detection.stats import Labels, best_threshold, calibration_error, evaluate_risk

READER = TableNormaliser(ObjectVocabulary.coco())


def written(text: str) -> SimpleNamespace:
    """A trace of one token per word, its space in front."""
    ends = [i for i in range(1, len(text)) if text[i] == " "] + [len(text)]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))

    def tokens_of(span):
        while text[span[0]].isspace():
            span = (span[0] + 1, span[1])
        at = [i for i, (a, b) in enumerate(spans) if a < span[1] and b > span[0]]
        return (at[0], at[-1] + 1)

    return SimpleNamespace(text=text, spans=spans, tokens_of=tokens_of)


def labels_of(text: str, truth: set[str], **options) -> list[tuple[str, int]]:
    units = mention_units(written(text), READER, truth, **options)
    return [(text[slice(*unit.span)], unit.label) for unit in units]


def test_mentions_are_labelled_to_the_character():
    text = "A dog and two fire hydrants near the dog's bench."
    trace = written(text)
    units = mention_units(trace, READER, {"dog", "bench"}, mentions="all")
    assert [text[slice(*unit.span)] for unit in units] == ["dog", "fire hydrants", "dog's", "bench"]
    assert [unit.label for unit in units] == [0, 1, 0, 0]
    assert [unit.occurrence for unit in units] == [0, 0, 1, 0]
    assert units[1].tokens == (4, 6)
    assert units[1].word == 4


def test_first_mentions_leave_repeats_out():
    assert labels_of("A dog sees a cat. The dog runs.", {"dog"}) == [("dog", 0), ("cat", 1)]


@pytest.mark.parametrize(
    "text",
    [
        "There are no cars here.",
        "A street without a car.",
        "A car is not visible.",
        "There might be a car.",
        "The car isn't there.",
        'A sign that says "car" hangs there.',
    ],
)
def test_denied_hedged_and_quoted_mentions_are_left_open(text):
    assert labels_of(text, set()) == [("car" if "cars" not in text else "cars", -1)]


def test_a_denial_ends_with_its_clause():
    assert labels_of("There are no people, a car is parked.", set())[-1] == ("car", 1)


def test_a_bare_table_is_no_evidence_of_a_dining_table():
    assert labels_of("A table.", set()) == [("table", -1)]
    assert labels_of("A table.", {"dining table"}) == [("table", 0)]
    assert labels_of("A dining table.", set()) == [("dining table", 1)]


def test_a_text_as_a_whole_is_hallucinated_where_any_mention_is():
    def whole(text: str) -> list[tuple[int, int]]:
        trace = written(text)
        trace.n_tokens = len(trace.spans)
        units = mention_units(trace, READER, {"dog"}, mentions="text")
        return [(unit.label, unit.word) for unit in units]

    assert whole("A dog sees a cat.") == [(1, 5)]
    assert whole("A dog runs.") == [(0, 3)]
    assert whole("A dog, no cat.") == [(-1, 4)]
    assert whole("Nothing.") == [(-1, 1)]


def test_sentences_of_flagged_mentions_are_dropped():
    text = "A dog runs. A cat sleeps! The car"
    units = mention_units(written(text), READER, set())
    flags = [unit.name == "cat" for unit in units]
    assert without_risky_sentences(text, units, flags) == "A dog runs. The car"
    assert without_risky_sentences(text, units, [False] * 3) == text
    assert without_risky_sentences(text, units, [True] * 3) == ""


def test_captions_are_cut_before_their_first_flagged_mention():
    text = "A dog runs. A cat sleeps! The car"
    units = mention_units(written(text), READER, set())
    assert cut_short(text, units, [False, True, True]) == "A dog runs. A"
    assert cut_short(text, units, [False] * 3) == text


def dropping_of(texts: dict[str, str], truth: dict[str, frozenset[str]]) -> Dropping:
    units, items = [], []
    for item, text in texts.items():
        found = mention_units(written(text), READER, truth[item])
        units += found
        items += [item] * len(found)
    return Dropping(Collected(units, items, items, {}, texts), truth, READER)


def test_dropping_what_is_wrong_lowers_chair_and_keeps_recall():
    texts = {"1": "A cat sleeps. A dog runs.", "2": "A dog. A car."}
    truth = {"1": frozenset({"dog"}), "2": frozenset({"dog", "car"})}
    dropping = dropping_of(texts, truth)
    risk = dropping.data.labels.numpy().astype(float)
    found = drop_curves({"perfect": risk}, dropping, shares=(0.25,), n_resamples=20)
    (dropped,) = found["detectors"]["perfect"]
    assert found["whole"]["CHAIRi"]["value"] == 0.25
    assert dropped["CHAIRi"]["value"] == 0
    assert found["whole"]["Recall"]["value"] == dropped["Recall"]["value"] == 1
    assert dropped["against_trivial"]["gap"] == 0.25


def test_dropping_the_last_sentences_is_no_better_than_doing_so_by_position():
    # In every caption the last of four objects is missing from the image.
    texts = {str(i): "A dog. A car. A bench. A cat." for i in range(30)}
    truth = {item: frozenset({"dog", "car", "bench"}) for item in texts}
    dropping = dropping_of(texts, truth)
    labels, word = dropping.data.labels.numpy().astype(float), dropping.data.words.numpy()
    found = drop_curves(
        {"place": word, "wrong": -labels}, dropping, shares=(0.25,), n_resamples=100
    )
    assert found["trivial"]["position"][0]["CHAIRi"]["value"] == 0
    assert found["trivial"]["cut short"][0]["CHAIRi"]["value"] == 0
    assert found["trivial"]["random"][0]["CHAIRi"]["value"] == pytest.approx(0.25, abs=0.05)
    place, wrong = (found["detectors"][name][0]["against_trivial"] for name in ("place", "wrong"))
    assert (place["gap"], place["verdict"]) == (0, "not distinguishable")
    assert (wrong["gap"] < 0, wrong["verdict"]) == (True, "behind")


def planted(n_images=120, per_image=6, place=0.0, signal=0.0, seed=0) -> Collected:
    """Units whose label follows their place and a feature, as strongly as told."""
    generator = np.random.default_rng(seed)
    n = n_images * per_image
    word = np.tile(np.arange(per_image) * 6, n_images)
    x = generator.standard_normal(n)
    logits = place * (word - word.mean()) / word.std() + signal * x
    truth = generator.random(n) < 1 / (1 + np.exp(-logits))
    units = [
        Unit((int(w), int(w) + 1), (0, 1), word=int(w), label=int(t))
        for w, t in zip(word, truth, strict=True)
    ]
    image = [f"image {i // per_image}" for i in range(n)]
    features = {
        "entropy": torch.from_numpy(x)[:, None],
        "position": torch.from_numpy(word.astype(float))[:, None],
        "margin": torch.from_numpy(word + 0.5 * x)[:, None],
    }
    return Collected(units, image, image, features, {})


def test_a_detector_that_only_knows_the_place_does_not_work():
    data = planted(place=1.5)
    risk = data.features["margin"][:, 0].numpy()
    result = evaluate_risk(risk, data.as_labels(), n_resamples=200)
    assert result["auroc"]["value"] > 0.75
    assert result["auroc_at_equal_position"]["value"] == pytest.approx(0.5, abs=0.08)
    assert result["gain_auroc"]["ci95"][0] < 0
    assert result["works"] is False


def test_a_detector_that_knows_more_than_the_place_works():
    data = planted(place=1.5, signal=1.0)
    risk = data.features["entropy"][:, 0].numpy()
    result = evaluate_risk(risk, data.as_labels(), n_resamples=200)
    assert result["auroc_at_equal_position"]["value"] > 0.6
    assert result["gain_auroc"]["ci95"][0] > 0
    assert result["gain_log_loss"]["ci95"][0] > 0
    assert result["works"] is True


def test_rankings_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    data = planted(n_images=40, signal=1.0)
    risk, truth = np.round(data.features["entropy"][:, 0].numpy(), 1), data.labels.numpy() == 1
    result = evaluate_risk(risk, data.as_labels(), n_resamples=10)
    assert result["auroc"]["value"] == pytest.approx(metrics.roc_auc_score(truth, risk))
    expected = metrics.average_precision_score(truth, risk)
    assert result["average_precision"]["value"] == pytest.approx(expected)
    false, true, _ = metrics.roc_curve(truth, risk, drop_intermediate=False)
    assert result["tpr_at_5_fpr"]["value"] == pytest.approx(true[false <= 0.05].max())


def test_pairs_of_one_text_count_only_where_they_are_near():
    word = np.array([0.0, 8, 30, 0, 9])
    labels = Labels(
        np.array([False, True, True, True, False]), list("aaabb"), list("aaabb"), word, 0 * word
    )
    result = evaluate_risk(np.array([1.0, 2, 0, 1, 3]), labels, n_resamples=10)
    # Near pairs: 8 over 0 in the first text (right), 0 over 9 in the second (wrong).
    assert result["auroc_within_text"]["value"] == 0.5


def test_calibration_errors_and_thresholds_are_what_they_say():
    truth = np.array([False, False, True, True])
    assert calibration_error(np.array([0.0, 0.0, 1.0, 1.0]), truth, 2)[0] == 0
    assert calibration_error(np.array([0.5, 0.5, 0.5, 0.5]), truth, 2)[0] == 0.5
    assert best_threshold(np.array([0.1, 0.2, 0.6, 0.9]), truth) == pytest.approx(0.4)


def test_images_stay_in_their_part_whatever_others_there_are():
    names = [f"image {i}" for i in range(500)]
    parts = split_images(names)
    assert split_images(names[100:200]) == parts[100:200]
    assert [round(parts.count(p) / 500, 1) for p in ("train", "calibration", "test")] == [
        0.6,
        0.2,
        0.2,
    ]


def test_fitting_and_judging_keep_images_apart():
    data, other = planted(signal=1.5), planted(n_images=60, signal=1.5, seed=1)
    fitted = fit(build_detector("entropy"), data, {"layers": 6})
    assert fitted.is_calibrated
    with pytest.raises(DataError, match="fitted on 49 of these images"):
        evaluate({"entropy": fitted}, other)
    fresh = Collected(
        other.units, [f"new {i}" for i in other.image], other.item, other.features, {}
    )
    result = evaluate(
        {"entropy": fitted, "position": FittedDetector(build_detector("position"))},
        fresh,
        n_resamples=100,
    )
    found = result["detectors"]["entropy"]
    assert found["ece"] < 0.1
    assert found["balanced_accuracy"]["value"] > 0.6
    assert result["detectors"]["position"]["works"] is None
    assert "| position |" in table(result)
    assert "control" in table(result)
    refuse_leakage(fitted, fresh)


def test_what_the_place_tells_is_taken_off_features():
    data, other = planted(place=1.5), planted(n_images=100, place=1.5, seed=1)
    for position, low, high in (("none", 0.75, 1.0), ("residualize", 0.4, 0.6)):
        fitted = fit(build_detector("margin"), data, {}, Recipe(position=position))
        risk = fitted.raw(other.features["margin"], other.words).numpy()
        auroc = evaluate_risk(risk, other.as_labels(), n_resamples=10)["auroc"]["value"]
        assert low < auroc < high
    assert fitted.made_of["position"] == "residualize"


def test_weights_of_places_leave_the_signal_alone():
    data = planted(place=1.5, signal=1.0)
    both = torch.cat([data.features["position"], data.features["entropy"]], dim=1)
    data = dataclasses.replace(data, features={"entropy": both})
    share = {}
    for position in ("none", "ipw"):
        fitted = fit(build_detector("entropy"), data, {}, Recipe(position=position))
        place, signal = fitted.classifier.coef.tolist()
        share[position] = abs(place / signal)
    assert share["none"] > 0.8
    assert share["ipw"] < 0.35


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_network_is_fitted_by_either_preset(preset, monkeypatch):
    monkeypatch.setattr(
        "vlm_steer_eval.detection.run.choose_training", lambda *_, **__: Training(8, 1e-2, 4)
    )
    data = planted(n_images=60, signal=2.0)
    recipe = Recipe(preset, classifier="mlp", position="ipw")
    fitted = fit(build_detector("entropy"), data, {}, recipe)
    assert fitted.classifier.kind == "mlp"
    assert fitted.classifier.scale.eq(1).all() == (preset == "paper")
    assert fitted.made_of["epochs"] == 4
    result = evaluate_risk(fitted.raw(data.features["entropy"]).numpy(), data.as_labels())
    assert result["auroc"]["value"] > 0.8


def test_the_place_cannot_be_taken_out_of_the_place():
    for position in ("residualize", "ipw"):
        with pytest.raises(ConfigError, match="nothing but the place"):
            fit(build_detector("position"), planted(), {}, Recipe(position=position))


def test_an_image_in_two_parts_is_refused():
    data = planted(n_images=20)
    parts = split_images(data.image)
    parts[3] = "test" if parts[3] != "test" else "train"
    with pytest.raises(DataError, match="Split by image"):
        fit(build_detector("entropy"), data, {}, parts=parts)


def test_one_sided_and_broken_data_are_told():
    data = planted(n_images=30)
    one = Collected(
        [u for u in data.units if u.label == 1][:20], data.image[:20], data.item[:20], {}, {}
    )
    with pytest.raises(DataError, match="both kinds occur"):
        one.as_labels()
    with pytest.raises(DataError, match="not finite"):
        evaluate_risk(np.full(180, np.nan), data.as_labels())
    with pytest.raises(DataError, match=r"entropy, train images: .* cannot be told apart"):
        fit(build_detector("entropy"), data.where(torch.arange(180) < 12), {})
    broken = data.features["entropy"].clone()
    broken[100] = torch.nan
    data = dataclasses.replace(data, features={"entropy": broken})
    with pytest.raises(DataError, match="entropy, train images: 1 features are not finite"):
        fit(build_detector("entropy"), data, {}, parts=["train"] * 150 + ["calibration"] * 30)
    with pytest.raises(DataError, match="entropy: 1 of 180 risks are not finite"):
        evaluate({"entropy": FittedDetector(build_detector("entropy"))}, data)


def test_labelled_texts_are_checked_row_by_row(tmp_path):
    path = tmp_path / "texts.jsonl"
    row = {"image": "a.png", "text": "A dog.", "spans": [{"start": 2, "end": 5, "label": 1}]}
    path.write_text(json.dumps(row) + "\n")
    (item,) = labelled_texts(path, tmp_path, "Describe.").items
    assert item.gold["spans"] == [(2, 5, 1)]
    path.write_text(json.dumps({**row, "text": " ", "spans": []}) + "\n")
    with pytest.raises(DataError, match="row 1: the text is empty"):
        labelled_texts(path, tmp_path, "Describe.")
    for change, message in (
        ({"label": "wrong"}, "none of hallucinated"),
        ({"end": 99}, "6 characters"),
        ({"start": None}, "does not lie"),
        ({"start": "2"}, "from '2' to 5 does not lie"),
        ({"label": ["wrong"]}, "none of hallucinated"),
    ):
        bad = {**row, "spans": [{**row["spans"][0], **change}]}
        path.write_text(json.dumps(row) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(DataError, match=message):
            labelled_texts(path, tmp_path, "Describe.")


def test_texts_of_one_id_are_refused(tmp_path):
    path = tmp_path / "texts.jsonl"
    row = {"image": "a.png", "text": "A dog.", "spans": []}
    path.write_text("".join(json.dumps({**row, "id": name}) + "\n" for name in ("a", "b", "a")))
    with pytest.raises(DataError, match="row 3: the id 'a' is that of row 1 too"):
        labelled_texts(path, tmp_path, "Describe.")


@pytest.fixture
def collected(tiny, tmp_path, image_folder):
    """A function that collects what `entropy` sees of given texts about pictures."""

    def call(texts: dict[str, str], output=tmp_path / "batches"):
        path = tmp_path / "texts.jsonl"
        rows = [
            {"image": image, "text": text, "spans": [{"start": 0, "end": 1, "label": 0}] * bool(i)}
            for i, (image, text) in enumerate(texts.items())
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = labelled_texts(path, image_folder, "Describe.")
        detectors = {"entropy": build_detector("entropy")}
        return collect(source, *tiny, detectors, Settings(), output, model_name="tiny")

    return call


def test_images_that_cannot_be_used_are_left_out_again_and_again(collected, image_folder):
    whole = (image_folder / "scene_0.png").read_bytes()
    (image_folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    texts = {"cut.png": "A dog.", "none.png": "A dog.", "scene_1.png": "A cat."}
    for _ in range(2):
        found = collected(texts)
        assert [unit.name for unit in found.units] == ["a"]
        reasons = {failure["item"]: failure["error"] for failure in found.failures}
        assert "damaged or incomplete" in reasons["1"]
        assert "does not exist" in reasons["2"]
    with pytest.raises(DataError, match=r"none of 1 images can be read: .*cut\.png is damaged"):
        collected({"cut.png": "A dog."})


def test_texts_without_anything_to_judge_are_told(collected):
    with pytest.raises(DataError, match=r"none of 1 texts holds a part .* the first: 'A dog\.'"):
        collected({"scene_0.png": "A dog."})


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(collected, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"batches cannot be written"):
        collected({"none.png": "A dog."}, tmp_path / "file" / "batches")
    assert (tmp_path / "file").read_text() == "mine"


def test_options_of_detectors_are_set_by_name():
    found = parse_detectors(["svar", "entropy"], ["svar.layers=[0, 3]", "svar.heads=each"])
    assert found["svar"].options()["layers"] == (0, 3)
    for bad in ("layers=3", "sink_mass.pool=mean", "svar.layers"):
        with pytest.raises(ConfigError, match="DETECTOR"):
            parse_detectors(["svar"], [bad])


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_published_pickle_is_converted_and_nothing_in_it_runs(tmp_path):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x = np.random.default_rng(0).standard_normal((80, 12))
    y = (x[:, 0] > 0).astype(int)
    classifier = linear_model.LogisticRegression(max_iter=1000).fit(x, y)
    path = tmp_path / "classifier.pkl"
    path.write_bytes(pickle.dumps({"clf": classifier, "best_threshold": np.float64(0.7)}))
    fitted = convert_lookback(path, layers=3, heads=4)
    factual = classifier.predict_proba(x)[:, 1]
    risk = fitted.risk_of(torch.from_numpy(x)).sigmoid()
    np.testing.assert_allclose(risk.numpy(), 1 - factual, atol=1e-12)
    with pytest.raises(DataError, match="12 weights, but 32 layers"):
        convert_lookback(path, layers=32, heads=32)
    path.write_bytes(pickle.dumps({"clf": classifier, "more": Bomb()}))
    with pytest.raises(DataError, match="Nothing in it was run"):
        convert_lookback(path, layers=3, heads=4)


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        seen = capsys.readouterr()
        return int(caught.value.code or 0), seen.out, seen.err

    return call


def test_detectors_are_fitted_used_and_judged_from_the_command_line(run, tmp_path, image_folder):
    folder = tmp_path / "svar"
    options = ["--max-new-tokens", 40, "--resamples", 50, "--batch-size", 30]
    code, out, err = run(
        "detect", "fit", "svar", "--scenes", "broken", "--limit", 60, "--output", folder, *options
    )
    assert code == 0, err
    assert "| position |" in out
    assert (folder / "detector.safetensors").is_file()
    result = json.loads((folder / "detection.json").read_text())
    assert result["detectors"]["svar"]["auroc"]["ci95"] is not None
    fitted = (folder / "detector.json").read_bytes()
    for other in (["svar", "--position", "ipw"], ["entropy"], ["svar", "--set", "svar.pool=mean"]):
        code, _, err = run("detect", "fit", *other, "--output", folder)
        assert (code, "which would be replaced; give another --output" in err) == (2, True)
    assert (folder / "detector.json").read_bytes() == fitted
    score = ["detect", "score", folder, "--image", image_folder / "scene_0.png"]
    score += ["--text", "A dog and a car.", "--json"]
    code, out, err = run(*score)
    assert code == 0, err
    units = json.loads(out)[0]["units"]
    assert [unit["text"] for unit in units] == ["dog", "car"]
    assert all(0 <= unit["risk"] <= 1 for unit in units)
    _, out, _ = run(*score, "--base-rate", 0.01)
    rarer = json.loads(out)[0]["units"]
    assert all(new["risk"] < old["risk"] for new, old in zip(rarer, units, strict=True))
    assert [unit["flagged"] for unit in rarer] == [unit["flagged"] for unit in units]
    code, _, err = run("detect", "score", "svar", *score[3:], "--base-rate", 0.01)
    assert (code, "--base-rate 0.01 has no effect" in err) == (2, True)
    code, out, err = run(
        "detect",
        "eval",
        folder,
        "--scenes",
        "broken",
        "--limit",
        4,
        "--output",
        tmp_path / "again",
        *options,
    )
    assert (code, "would say nothing" in err) == (1, True)
    code, _, err = run("detect", "eval", "lookback_ratio", "--output", tmp_path / "again")
    assert (code, "has to be fitted" in err) == (2, True)
    code, out, err = run(
        "detect", "fit", "svar", "--scenes", "broken", "--limit", 60, "--output", folder, *options
    )
    assert code == 0, err
    assert (folder / "detector.json").read_bytes() == fitted
    code, out, _ = run("detect", "list")
    assert code == 0
    assert "svar: " in out


def test_the_list_says_what_each_detector_needs(run):
    _, out, _ = run("detect", "list")
    needs = {}
    for line in out.splitlines():
        if not line.startswith(" "):
            name = line.split(":")[0]
        elif line.startswith("    needs "):
            needs[name] = line.removeprefix("    needs ")
    assert needs["lookback_ratio"] == "fitting"
    assert needs["visual_dependence"] == "one more pass, without the image"
    assert needs["self_check"] == "the image, or a model to ask again"
    assert not {"position", "entropy", "svar"} & set(needs)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "unknown detector 'nowhere', and no folder of a fitted one"),
        (["a/b/c"], 1, "a/b/c holds no detector.json"),
        (["entropy", "--text", " "], 2, "--text is empty"),
        (["svar", "--set", "pool=mean"], 2, "for one of svar"),
    ],
)
def test_what_cannot_be_scored_is_told(run, image_folder, arguments, code, message):
    picture = image_folder / "scene_0.png"
    found, _, err = run("detect", "score", *arguments, "--image", picture)
    assert (found, message in err) == (code, True), err


def test_a_risk_that_is_no_number_is_an_error(run, image_folder, tiny, tmp_path):
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    model.lm_head.weight.data[5] = torch.nan
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--image", image_folder / "scene_0.png"]
    code, _, err = run("detect", "score", "logprob", *arguments, "--text", "A dog and a car.")
    assert (code, "logprob: 2 of 2 risks are no numbers" in err) == (1, True), err
