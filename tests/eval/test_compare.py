"""Comparing runs: what a planted difference gives, and what an excuse does not."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_steer.cli import main
from vlm_steer.errors import ConfigError, DataError
from vlm_steer.registry import list_methods
from vlm_steer.report import Report, render_html
from vlm_steer_eval.benchmarks.chair import CHAIR_METRICS
from vlm_steer_eval.benchmarks.pope import POPE_METRICS
from vlm_steer_eval.benchmarks.scoring import score_chair, score_pope
from vlm_steer_eval.reports import gallery as gallery_module
from vlm_steer_eval.reports.comparison import comparison_text
from vlm_steer_eval.reports.gallery import runs_gallery
from vlm_steer_eval.reports.tables import render
from vlm_steer_eval.running.arms import control_kind, controls_among, parse_arms, with_controls
from vlm_steer_eval.running.runs import RunArm, Runs, load_runs
from vlm_steer_eval.statistics.comparing import compare_runs
from vlm_steer_eval.statistics.count_model import poisson_fit, rate_ratio
from vlm_steer_eval.statistics.counts import Unit, read_units, write_units
from vlm_steer_eval.statistics.frontier import Axes, frontier, staircase
from vlm_steer_eval.statistics.matched import Caption, at_yes_ratio, sentence_ends

THINGS = ("dog", "cat", "car", "bus", "bench", "cup", "bowl", "chair")


def _captions(seed, *, invent, sentences=4, images=80):
    """Captions that name a true object per sentence, and invent one with a rising probability."""
    generator = np.random.default_rng(seed)
    rows = []
    for image in range(images):
        text = []
        for index in range(sentences):
            text.append(f"There is a {THINGS[index]}.")
            if generator.random() < invent * (index + 1):
                text.append("There is a zebra." if generator.random() < 0.5 else "I see a kite.")
        rows.append({"image_id": image, "caption": " ".join(text)})
    return rows


def _cut(row, *, sentences):
    kept = row["caption"].rstrip(".").split(". ")[:sentences]
    return {**row, "caption": ". ".join(kept) + "."}


def _chair_run(folder, rows):
    folder.mkdir(parents=True)
    captions = folder / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objects = folder / "objects.json"
    n = len(rows)
    objects.write_text(
        json.dumps({"names": THINGS, "objects": {str(i): list(range(8)) for i in range(n)}})
    )
    score_chair(captions, objects=objects, output=folder, n_resamples=10)
    return folder


@pytest.fixture(scope="module")
def chair_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    base = _captions(0, invent=0.12)
    return {
        "base": _chair_run(root / "base", base),
        "better": _chair_run(root / "better", _captions(0, invent=0.02)),
        "worse": _chair_run(root / "worse", _captions(0, invent=0.3)),
        "shorter": _chair_run(root / "shorter", [_cut(row, sentences=3) for row in base]),
    }


@pytest.fixture(scope="module")
def compared(chair_runs):
    return compare_runs(load_runs(list(chair_runs.values())), n_resamples=1000)


def test_a_planted_gain_is_found_everywhere(compared):
    entry = compared["differences"]["better"]["all"]["CHAIRi"]
    assert entry["ci95"][1] < 0
    assert entry["p_holm"] < 0.05
    assert entry["p"] <= entry["p_bh"] <= entry["p_holm"]
    assert compared["matched"]["better"]["length"]["differences"]["CHAIRi"]["ci95"][1] < 0
    assert compared["length_adjusted"]["better"]["ci95"][1] < 1
    assert compared["frontier"]["verdicts"]["better"]["verdict"] == "beyond"
    assert compared["frontier"]["verdicts"]["worse"]["verdict"] == "behind"


def test_saying_less_looks_better_and_is_not(compared):
    plain = compared["differences"]["shorter"]["all"]
    assert plain["CHAIRi"]["ci95"][1] < 0  # what would be published
    verdict = compared["frontier"]["verdicts"]["shorter"]
    assert (verdict["verdict"], verdict["gap"]) == ("not distinguishable", 0)
    matched = compared["matched"]["shorter"]["recall"]
    assert matched["shortened"] == "baseline"
    assert matched["differences"]["Recall"]["value"] == pytest.approx(0, abs=0.02)
    assert matched["differences"]["CHAIRi"]["p_holm"] > 0.05


def test_the_same_comparison_twice_gives_the_same_numbers(chair_runs, compared):
    again = compare_runs(load_runs(list(chair_runs.values())), n_resamples=1000)
    assert again == compared


def test_a_trivial_arm_extends_the_frontier_and_gets_no_verdict(chair_runs):
    runs = load_runs([chair_runs["base"], chair_runs["shorter"], chair_runs["better"]])
    result = compare_runs(runs, trivial=["shorter"], n_resamples=200)
    assert "shorter" in result["frontier"]["points"]
    assert set(result["frontier"]["verdicts"]) == {"better"}
    assert "shorter" in result["differences"]
    named = {"trivial:shorter" if name == "shorter" else name: a for name, a in runs.arms.items()}
    again = compare_runs(dataclasses.replace(runs, arms=named), n_resamples=200)
    assert again["trivial"] == ["trivial:shorter"]
    assert again["frontier"]["verdicts"] == result["frontier"]["verdicts"]
    assert sum(name.endswith("words") for name in again["frontier"]["points"]) == 7
    with pytest.raises(ConfigError, match="'base' is no arm"):
        compare_runs(runs, trivial=["base"], n_resamples=10)


def test_trivial_arms_take_no_part_in_corrections(chair_runs):
    runs = load_runs([chair_runs[name] for name in ("base", "shorter", "better", "worse")])
    alone = compare_runs(
        load_runs([chair_runs[name] for name in ("base", "better", "worse")]), n_resamples=100
    )
    result = compare_runs(runs, trivial=["shorter"], n_resamples=100)
    for name in ("better", "worse"):
        assert result["differences"][name] == alone["differences"][name]
    assert set(result["matched"]) == set(result["length_adjusted"]) == {"better", "worse"}


def test_controls_take_no_part_in_corrections_and_keep_their_p(chair_runs):
    named = {"better": "vhr", "worse": "vcd", "shorter": "sham:vhr"}
    loaded = load_runs([chair_runs[name] for name in ("base", *named)])
    arms = {named.get(name, name): arm for name, arm in loaded.arms.items()}
    arms |= {"mask:vcd": arms["vhr"], "run/yes_bias": arms["vcd"]}
    methods = {name: arms[name] for name in ("base", "vhr", "vcd")}
    alone, result = (
        compare_runs(dataclasses.replace(loaded, arms=chosen), n_resamples=100)
        for chosen in (methods, arms)
    )
    controls = ["sham:vhr", "mask:vcd", "run/yes_bias"]
    assert (alone["uncorrected"], result["uncorrected"]) == ([], controls)
    for table in ("differences", "matched", "length_adjusted"):
        assert alone[table] == {name: result[table][name] for name in ("vhr", "vcd")}
    verdicts = result["frontier"]["verdicts"]
    assert alone["frontier"]["verdicts"] == {name: verdicts[name] for name in ("vhr", "vcd")}
    for control in controls:
        entry = result["differences"][control]["all"]["CHAIRi"]
        assert entry["p"] is not None
        assert not {"p_holm", "p_bh"} & set(entry)
        assert verdicts[control]["p_holm"] is None
    assert verdicts["mask:vcd"]["verdict"] == "beyond"
    table = render(*comparison_text(result), width=240)
    assert "° p without correction: sham:vhr, mask:vcd, run/yes_bias" in table
    # Another kind of control changes nothing in what is said against the first.
    fewer = {name: arm for name, arm in arms.items() if name != "run/yes_bias"}
    without = compare_runs(dataclasses.replace(loaded, arms=fewer), n_resamples=100)["controls"]
    assert without["vhr"]["sham:vhr"] == result["controls"]["vhr"]["sham:vhr"]


def test_runs_under_several_seeds_are_pooled(tmp_path):
    folders = []
    for seed in range(3):
        arms = {"none": _captions(seed, invent=0.2), "method": _captions(seed + 9, invent=0.05)}
        scored = [_chair_run(tmp_path / f"{seed}-{arm}", rows) for arm, rows in arms.items()]
        folders.append(tmp_path / f"seed{seed}")
        folders[-1].mkdir()
        units = [read_units(folder / "counts.jsonl", 8)["scored"] for folder in scored]
        rule = {"benchmark": "chair", "normaliser": "table", "arms": {}}
        (folders[-1] / "scores.json").write_text(json.dumps(rule))
        write_units(
            folders[-1] / "counts.jsonl",
            {arm: list(found.values()) for arm, found in zip(arms, units, strict=True)},
        )
    pooled = compare_runs(load_runs(folders, pool=True), n_resamples=300)
    single = [compare_runs(load_runs([folder]), n_resamples=300) for folder in folders]
    assert (pooled["n_units"], pooled["n_images"]) == (240, 80)
    values = [one["arms"]["method"]["all"]["metrics"]["CHAIRi"]["value"] for one in single]
    found = pooled["seeds"]["method"]["CHAIRi"]
    assert found["values"] == values
    assert found["sd"] == pytest.approx(np.std(values, ddof=1))

    def width(result):
        low, high = result["differences"]["method"]["all"]["CHAIRi"]["ci95"]
        return high - low

    assert width(pooled) < min(map(width, single))
    # The same answers twice say nothing new.
    twice = compare_runs(load_runs([folders[0]] * 2, pool=True), n_resamples=300)
    assert width(twice) == pytest.approx(width(single[0]))
    assert "Seed by seed" in render(*comparison_text(pooled), width=200)
    with pytest.raises(ConfigError, match="--pool"):
        load_runs([folders[0], tmp_path / "0-none"], pool=True)


def test_another_baseline_turns_the_differences_around(chair_runs):
    folders = [chair_runs["base"], chair_runs["better"]]
    one = compare_runs(load_runs(folders), n_resamples=100)
    other = compare_runs(load_runs(folders, baseline="better"), n_resamples=100)
    there = one["differences"]["better"]["all"]["CHAIRi"]
    back = other["differences"]["base"]["all"]["CHAIRi"]
    assert there["value"] == -back["value"]
    with pytest.raises(ConfigError, match="--baseline"):
        load_runs(folders, baseline="none")


def test_runs_that_cannot_be_compared_are_refused_by_name(chair_runs, tmp_path, question_file):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": i, "text": "Yes"}) + "\n" for i in range(1, 9))
    )
    score_pope(question_file, answers, output=tmp_path / "pope", n_resamples=10)
    score_pope(question_file, answers, parser="vcd", output=tmp_path / "vcd", n_resamples=10)
    with pytest.raises(ConfigError, match="scored by one rule"):
        load_runs([tmp_path / "pope", tmp_path / "vcd"])
    with pytest.raises(ConfigError, match="one benchmark"):
        load_runs([chair_runs["base"], tmp_path / "pope"])
    with pytest.raises(ConfigError, match="single arm"):
        load_runs([tmp_path / "pope"])
    with pytest.raises(ConfigError, match="two runs are called"):
        load_runs([tmp_path / "pope", tmp_path / "pope"])
    with pytest.raises(DataError, match="holds no scores"):
        load_runs([tmp_path, tmp_path / "pope"])


def test_runs_over_other_images_are_refused_or_cut_to_what_they_share(chair_runs, tmp_path):
    fewer = _chair_run(tmp_path / "fewer", _captions(0, invent=0.02)[:60])
    folders = [chair_runs["base"], fewer]
    with pytest.raises(DataError, match="20 units"):
        load_runs(folders)
    result = compare_runs(load_runs(folders, missing="exclude"), n_resamples=50)
    assert (result["n_units"], len(result["excluded"])) == (60, 20)


def test_a_constant_yes_bias_is_no_gain(tmp_path):
    # An eval run whose method only says yes more often, by its own margins.
    rows, counts = [], []
    for arm, bias in (("none", 0.0), ("yes_bias", 1.0)):
        noise = np.random.default_rng(1)
        for i in range(300):
            label = "yes" if i % 2 else "no"
            margin = float(noise.normal(0.8 if i % 2 else -0.8, 1.5))
            said = "yes" if margin + bias > 0 else "no"
            rows.append(
                {"arm": arm, "item": str(i), "text": said, "label": label, "margin": margin}
            )
            cell = ("T" if said == label else "F") + ("P" if said == "yes" else "N")
            row = [int(cell == c) for c in ("TP", "FP", "TN", "FN")]
            counts.append(
                {
                    "arm": arm, "unit": str(i), "cluster": str(i // 6), "part": "random",
                    "counts": [*row, 1, 1, int(said == "yes"), 0],
                }
            )  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    for name, lines in (("samples.jsonl", rows), ("counts.jsonl", counts)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "scores.json").write_text(
        json.dumps({"benchmark": "pope", "parser": "robust", "arms": {}})
    )
    (folder / "timings.jsonl").write_text(
        '{"arm": "none", "answers": 300, "tokens": 600, "seconds": 2.0, "passes": 600, '
        '"memory": null}\n'
        '{"arm": "yes_bias", "answers": 300, "tokens": 600, "seconds": 4.0, "passes": 1500, '
        '"memory": 9}\n{"arm": "no'
    )
    result = compare_runs(load_runs([folder]), n_resamples=500)
    assert result["differences"]["yes_bias"]["random"]["recall"]["ci95"][0] > 0
    matched = result["matched"]["yes_bias"]["yes_ratio"]["differences"]
    assert (matched["accuracy"]["value"], matched["accuracy"]["ci95"]) == (0, [0, 0])
    assert result["frontier"]["verdicts"]["yes_bias"]["verdict"] == "not distinguishable"
    assert len(result["frontier"]["points"]) == 20
    cost = result["cost"]["yes_bias"]
    assert (cost["relative_speed"], cost["relative_passes"]) == (0.5, 2.5)
    assert (cost["memory"], cost["relative_memory"]) == (9, None)


def test_every_arm_stands_beside_its_own_controls():
    names = ["none", "var", "sham:var", "vcd", "mask:vcd", "yes_bias", "r/var", "r/sham:var"]
    assert controls_among("var", names) == ["sham:var", "yes_bias"]
    assert controls_among("vcd", names) == ["mask:vcd", "yes_bias"]
    assert controls_among("r/var", names) == ["yes_bias", "r/sham:var"]
    kinds = {"sham:var": "sham", "yes_bias": "yes_bias", "r/mask:a/b.yaml": "mask", "r/var": None}
    for control, kind in kinds.items():
        assert control_kind(control) == kind
        assert kind is None or controls_among(control, names) == []


def test_controls_are_added_where_there_are_any():
    arms = with_controls(parse_arms("none,vaf,vcd,vaf+vcd,sham:spin"))
    names = [arm.name for arm in arms]
    expected = ["none", "vaf", "sham:vaf", "vcd", "vaf+vcd", "sham:spin"]
    if "plausibility_mask" in list_methods():
        expected.insert(4, "mask:vcd")
    assert names == expected
    assert with_controls(arms) == arms
    with pytest.raises(ConfigError, match="plausibility mask"):
        parse_arms("mask:vaf")


def test_a_method_is_held_against_its_own_sham(chair_runs, tmp_path):
    # The "method" and its "sham" hallucinate equally: better than the baseline, but not by aim.
    for name, seed in (("vhr", 5), ("sham:vhr", 6)):
        _chair_run(tmp_path / name, _captions(seed, invent=0.02))
    runs = [chair_runs["base"], tmp_path / "vhr", tmp_path / "sham:vhr"]
    result = compare_runs(load_runs(runs), n_resamples=300)
    assert result["differences"]["vhr"]["all"]["CHAIRi"]["p_holm"] < 0.05
    assert set(result["controls"]) == {"vhr"}
    beside = result["controls"]["vhr"]["sham:vhr"]["CHAIRi"]
    assert beside["p_holm"] > 0.05
    assert "Methods against their own controls" in render(*comparison_text(result), width=200)


def test_the_report_shows_answers_with_what_is_invented_marked(chair_runs, tmp_path):
    Image.new("RGB", (400, 300), "red").save(tmp_path / "3.png")
    evil = "<script>alert(1)</script> A zebra and a dog."
    rows = [{**row, "caption": evil} for row in _captions(0, invent=0.1)]
    runs = load_runs([chair_runs["base"], _chair_run(tmp_path / "evil", rows)])
    gallery = runs_gallery(runs, images=tmp_path, n_samples=5)
    assert len(gallery.samples) == 5
    page = render_html(Report("t", "s", [gallery]))
    assert "<script>" not in page
    assert '<mark class="wrong"' in page
    assert ">zebra</mark>" in page
    assert runs_gallery(runs, n_samples=0) is None


def test_pictures_are_found_by_name_and_bounded_in_bytes(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    row = {"text": "Yes", "label": "no", "parsed": "yes", "image": "a.png", "prompt": "?"}
    counts = [0, 1, 0, 0, 1, 1, 1, 0]
    arm = RunArm(
        "none",
        {str(i): Unit(str(i), str(i), "", counts) for i in range(3)},
        {str(i): row for i in range(3)},
    )
    runs = Runs("pope", {}, {"none": arm, "m": arm}, "none")
    images = [s.image for s in runs_gallery(runs, images=tmp_path).samples]
    assert all(image.startswith("data:image/png;base64,") for image in images)
    assert [s.image for s in runs_gallery(runs).samples] == ["", "", ""]
    monkeypatch.setattr(gallery_module, "_PICTURE_BYTES", 2 * len(images[0]))
    assert [bool(s.image) for s in runs_gallery(runs, images=tmp_path).samples] == [
        True, True, False,
    ]  # fmt: skip
    scene = {**row, "image": "broken/300000"}
    assert gallery_module._sources(scene["image"], None)[0].split == "broken"


def test_the_command_writes_json_a_table_and_a_page(chair_runs, tmp_path, capsys):
    output = tmp_path / "out"
    folders = [str(chair_runs[name]) for name in ("base", "better")]
    nasty = _chair_run(tmp_path / "<b>&nasty", _captions(3, invent=0.1))
    with pytest.raises(SystemExit) as stop:
        main(["compare", *folders, str(nasty), "--output", str(output), "--resamples", "200"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "At matched length" in out
    assert "Against trivial baselines" in out
    assert (output / "table.txt").read_text() in out
    result = json.loads((output / "compare.json").read_text())
    assert set(result["arms"]) == {"base", "better", "<b>&nasty"}
    html = (output / "report.html").read_text()
    assert "<b>&nasty" not in html
    assert html.count("<svg") == 2
    assert not re.search(r"<script|https?:", html)


def test_the_command_ends_with_2_for_bad_usage(chair_runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(chair_runs["base"]), "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "another run" in " ".join(capsys.readouterr().err.split())


# The pieces.


def _sample(text, mentions, objects=("dog",)):
    return {
        "caption": text,
        "words": len(text.split()),
        "objects": list(objects),
        "mentions": [
            {
                "span": [text.index(name), text.index(name) + len(name)],
                "object": name,
                "hallucinated": name not in objects,
                "word": 0,
            }
            for name in mentions
        ],
    }


def test_timings_that_are_damaged_are_left_aside(chair_runs, tmp_path):
    shutil.copytree(chair_runs["base"], tmp_path / "base")
    (tmp_path / "base/timings.jsonl").write_bytes(b"\xff\xfe{\n")
    runs = load_runs([tmp_path / "base", chair_runs["better"]])
    assert runs.arms["base"].cost is None


def test_a_single_run_is_not_pooled_and_pictures_need_a_folder(chair_runs, tmp_path):
    with pytest.raises(ConfigError, match="--pool takes several folders"):
        load_runs([chair_runs["base"]], pool=True)
    runs = [str(chair_runs["base"]), str(chair_runs["better"])]
    with pytest.raises(SystemExit) as stop:
        main(["compare", *runs, "--images", str(tmp_path / "x"), "--output", str(tmp_path / "k")])
    assert stop.value.code == 1


def test_a_caption_is_counted_up_to_where_it_is_cut():
    caption = Caption(_sample("A dog sits. A cat and a bus!", ["dog", "cat", "bus"]))
    assert caption.counts() == [1, 1, 3, 2, 1, 1, 3, 8]
    assert caption.counts(caption.after_sentences(1)) == [1, 0, 1, 0, 1, 1, 1, 3]
    assert caption.counts(caption.after_sentences(2)) == caption.counts()
    assert caption.counts(caption.after_sentences(0)) == [1, 0, 0, 0, 0, 1, 0, 0]
    assert caption.counts(caption.after_words(5)) == [1, 1, 2, 1, 1, 1, 2, 5]
    assert Caption(_sample("", [])).counts(0) == [1, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "ends"),
    [("", []), ("One. Two", [4, 8]), ("3.5 dogs.", [9]), ("Well... yes!", [7, 12]), ("  ", [])],
)
def test_sentences_end_where_readers_would_end_them(text, ends):
    assert sentence_ends(text) == ends


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.floats(0, 1))
def test_a_bias_says_yes_to_the_wanted_share(values, share):
    rows = np.array(at_yes_ratio(values, ["yes"] * len(values), share))
    ratio = POPE_METRICS.evaluate(rows.sum(0))["yes_ratio"]
    assert ratio == pytest.approx(round(share * len(values)) / len(values))


def test_the_staircase_is_the_least_error_at_that_recall_or_more():
    recall, error = np.array([0.3, 0.6, 0.8]), np.array([0.05, 0.2, 0.1])
    at = np.array([0.1, 0.3, 0.5, 0.8, 0.9])
    assert staircase(recall, error, at) == pytest.approx([0.05, 0.05, 0.1, 0.1, 0.1])
    assert np.isnan(staircase(recall, np.full(3, np.nan), at)).all()


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.lists(st.floats(0, 1), min_size=2, max_size=5),
)
@settings(deadline=None)
def test_the_staircase_rises_with_recall_and_no_point_lies_below_it(points, at):
    recall, error = (np.array(column) for column in zip(*points, strict=True))
    steps = staircase(recall, error, np.sort(np.array(at)))
    assert (np.diff(steps) >= 0).all()
    assert (staircase(recall, error, recall) <= error).all()


def test_the_verdict_of_noise_is_seldom_beyond():
    """Methods that are the baseline plus noise must not be called better more often than 5 %."""
    generator = np.random.default_rng(4)
    axes = Axes("Recall", "CHAIRi")
    beyond = 0
    for seed in range(60):

        def rows(rate=0.15):
            wrong = generator.binomial(6, rate, size=60)
            right = generator.binomial(5, 0.7, size=60)
            return [[1, int(w > 0), 6, w, r, 5, 6, 50] for w, r in zip(wrong, right, strict=True)]

        result = frontier(
            CHAIR_METRICS, axes, {"a": rows(), "b": rows()}, {"m": rows()},
            [str(i) for i in range(60)], n_resamples=200, seed=seed,
        )  # fmt: skip
        beyond += result["verdicts"]["m"]["verdict"] == "beyond"
    assert beyond <= 6


def test_the_count_model_is_poisson_regression():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is absent")
    generator = np.random.default_rng(0)
    exposure = generator.integers(1, 9, size=200).astype(float)
    x = np.stack([np.ones(200), generator.integers(0, 2, 200), generator.normal(size=200)], axis=1)
    events = generator.poisson(exposure * np.exp(x @ [-1.5, -0.4, 0.3]))
    ours = poisson_fit(events, exposure, x)
    reference = linear_model.PoissonRegressor(alpha=0, max_iter=500, tol=1e-10)
    reference.fit(x[:, 1:], events / exposure, sample_weight=exposure)
    assert ours == pytest.approx([reference.intercept_, *reference.coef_], abs=1e-5)


def test_a_rate_that_only_rises_with_length_has_ratio_one_at_equal_length():
    generator = np.random.default_rng(1)
    lengths = np.concatenate([generator.integers(60, 120, 2000), generator.integers(20, 80, 2000)])
    mentions = np.maximum(1, lengths // 10)
    events = generator.binomial(mentions, 0.002 * lengths)
    treated = np.arange(4000) >= 2000
    clusters = [str(i % 2000) for i in range(4000)]
    found = rate_ratio(events, mentions, lengths, treated, clusters)
    assert events[treated].sum() / mentions[treated].sum() < 0.7 * (
        events[~treated].sum() / mentions[~treated].sum()
    )
    assert found.interval.low < 1 < found.interval.high
    halved = np.where(treated, generator.binomial(events, 0.5), events)
    assert rate_ratio(halved, mentions, lengths, treated, clusters).value == pytest.approx(
        0.5, abs=0.06
    )


def test_a_model_that_cannot_be_fitted_is_none():
    arm = np.array([False, False, True, True])
    clusters = ["a", "b", "a", "b"]
    assert rate_ratio([0, 0, 0, 0], [3, 3, 3, 3], [5, 6, 7, 8], arm, clusters) is None
    assert rate_ratio([1, 1, 0, 0], [3, 3, 3, 3], [5, 6, 5, 6], arm, clusters) is None
    assert rate_ratio([0, 0, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8], arm, clusters) is None
