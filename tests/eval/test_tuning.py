"""Search spaces, goals and data of a tuning, and the study that survives what happens to it."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from vlm_steer._yaml import parse_yaml
from vlm_steer.config import find_preset, list_presets, resolve
from vlm_steer.errors import ConfigError, DataError, UnsupportedModelError
from vlm_steer_eval.tuning.data import gather, read_sources
from vlm_steer_eval.tuning.goals import read_goals
from vlm_steer_eval.tuning.measure import Score
from vlm_steer_eval.tuning.outcome import choose, describe
from vlm_steer_eval.tuning.plan import read_plan
from vlm_steer_eval.tuning.space import read_space
from vlm_steer_eval.tuning.study import JOURNAL_NAME, REFUSED, TuningStudy

ALPHA = "{method: pai, gamma: 1.0, alpha: {min: 0.0, max: 1.0}}"
AIM = "objectives: {chair_i: min, recall: max}"
IMAGES = 24


def space_of(method):
    data, place = parse_yaml(f"methods: [{method}]", "tune.yaml")
    return read_space(data["methods"], place)


def goals_of(text):
    data, place = parse_yaml(text, "tune.yaml")
    return read_goals(data.get("objectives", {}), data.get("constraints", {}), place)


def sources_of(text, benchmarks=("chair",), tuning=True):
    data, place = parse_yaml(f"data: {text}", "tune.yaml")
    return read_sources(data["data"], benchmarks, place["data"], tuning=tuning)


class FakeMeter:
    """Three parts of eight images; more alpha invents less and mentions less."""

    n_parts = 3

    def __init__(self, hook=lambda methods, part: None):
        self.seen = []
        self._hook = hook

    def add(self, score, methods, part):
        self.seen.append((methods, part))
        self._hook(methods, part)
        alpha = methods[0].alpha if methods else 0.0
        per_part = IMAGES // self.n_parts
        for image in range(part * per_part, (part + 1) * per_part):
            wrong, right = 20 - round(15 * alpha) + image % 3, 50 - round(30 * alpha**3)
            counts = [1, 1, wrong + right, wrong, right, 60, wrong + right, 90]
            score.counts.setdefault("chair", {})[f"{image:02}"] = counts
        score.spent = {"cost": 1.0 + alpha, "passes": 2.0}

    def whole(self, methods=()):
        score = Score()
        for part in range(self.n_parts):
            self.add(score, methods, part)
        return score


BASELINE = FakeMeter().whole()


def study_in(folder, goals=AIM, method=ALPHA, n_trials=6, **options):
    chosen = {"sampler": "tpe", "prune": False, "seed": 0, **options}
    identity = {"space": method, "objectives": goals}
    return TuningStudy(
        folder, identity, space_of(method), goals_of(goals), n_trials=n_trials, **chosen
    )


def work(study, meter=None, tell=lambda text: None):
    study.work(meter or FakeMeter(), BASELINE, tell=tell, wait=True)


def settings(study):
    return [t.params["pai.alpha"] for t in study.trials()]


# -- the space ---------------------------------------------------------------------------------


def test_a_range_stands_anywhere_in_a_value_and_a_selector_is_no_range():
    space = space_of("{method: pai, alpha: {min: 0.1, max: 1}, layers: {last: {min: 2, max: 6}}}")
    assert [p.name for p in space.parameters] == ["pai.alpha", "pai.layers.last"]
    assert [p.whole for p in space.parameters] == [False, True]
    (method,) = space.methods({"pai.alpha": 0.3, "pai.layers.last": 4})
    assert (method.alpha, method.layers) == (0.3, {"last": 4})
    fixed = space_of("{method: pai, layers: {last: 14}, alpha: {choices: [0.1, 0.5]}}")
    assert [p.name for p in fixed.parameters] == ["pai.alpha"]


def test_two_methods_of_one_name_are_told_apart():
    vcd = "{method: vcd, alpha: {min: 0.5, max: 1.0}}"
    assert [p.name for p in space_of(f"{vcd}, {vcd}").parameters] == ["vcd#1.alpha", "vcd#2.alpha"]


def test_the_search_starts_at_the_defaults_of_the_method():
    space = space_of("{method: vcd, noise_step: {min: 300, max: 900}, beta: {choices: [0.2, 0.1]}}")
    assert space.start() == {"vcd.noise_step": 500, "vcd.beta": "0.1"}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{method: pai, alpha: 0.5}", "nothing to search"),
        ("pai", "nothing to search"),
        ("{method: pai, alpha: {min: -1, max: 1}}", "tune.yaml:1: pai: alpha is -1.0; it must"),
        ("{method: pai, alpa: {min: 0, max: 1}}", "unknown option 'alpa' for pai. Did you mean"),
        ("{method: pia, alpha: {min: 0, max: 1}}", "unknown method 'pia'"),
        ("{method: pai, alpha: {min: 0.1}}", "a range has min and max"),
        ("{method: pai, alpha: {min: 1, max: 1}}", "must lie below"),
        ("{method: pai, alpha: {min: 0, max: 1, setp: 1}}", "'setp' does not belong to a range"),
        ("{method: pai, alpha: {min: 0, max: 1, step: 0.3}}", "in whole steps"),
        ("{method: pai, alpha: {min: 0, max: 1, log: true}}", "a min above 0"),
        ("{method: pai, alpha: {min: low, max: 1}}", 'min must be a number, not "low"'),
        ("{method: pai, alpha: {choices: [0.1]}}", "at least two values"),
        ("{method: pai, alpha: {choices: [0.1, high]}}", "alpha must be a number"),
        ("{method: vcd, noise_step: {min: 0.5, max: 2}}", "noise_step must be a whole number"),
        ("{method: vcd, noise_step: {min: 1, max: 2000}}", "noise_step"),
    ],
)
def test_a_wrong_space_is_refused_when_it_is_read(method, message):
    with pytest.raises(ConfigError) as error:
        space_of(method)
    assert message in str(error.value)
    assert str(error.value).startswith("tune.yaml:1: ")


# -- the goals ---------------------------------------------------------------------------------


def test_bounds_are_numbers_or_follow_the_baseline():
    text = "{recall: {at_least: baseline - 2}, cost: {at_most: baseline * 1.5}, f1: {at_least: 40}}"
    goals = goals_of(f"{AIM}\nconstraints: {text}")
    assert [c.violation(70.0, 73.0) for c in goals.constraints] == [1.0, -39.5, -30.0]
    assert str(goals.constraints[0]) == "recall at least baseline - 2"
    assert goals.benchmarks == ("chair",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objectives: {}", "nothing to aim at"),
        ("objectives: {chairi: min}", "unknown objective 'chairi'. Did you mean 'chair_i'"),
        ("objectives: {recall: min}", "min would search for what is worse. Write max"),
        ("objectives: {recall: up}", "recall must be min or max"),
        ("objectives: {cost: min}", "costs alone"),
        (f"{AIM}\nconstraints: {{recall: 70}}", "such as {at_least: baseline - 2}"),
        (f"{AIM}\nconstraints: {{recall: {{at_least: basline - 2}}}}", "the bound of recall"),
        (f"{AIM}\nconstraints: {{length: {{below: 3}}}}", "the constraint on length"),
    ],
)
def test_a_wrong_goal_is_refused_with_what_there_is(text, message):
    with pytest.raises(ConfigError) as error:
        goals_of(text)
    assert message in str(error.value)


# -- the data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{chair: {scenes: broken}}", "'broken' are a test split"),
        ("{chair: {dataset: x, dataset_split: Test}}", "'Test' is a test split"),
        ("{chair: {dataset: x}}", "dataset needs dataset_split"),
        ("{chair: {objects: x.json}}", "objects needs images, the folder of the images"),
        ("{chair: {}}", "expected one of scenes, annotations, objects, dataset, found none"),
        ("{chair: {scenes: validation, dataset: x}}", "found scenes and dataset"),
        ("{pope: {scenes: validation}}", "no objective or constraint is about 'pope'"),
        ("{chair: {scene: validation}}", "unknown option 'scene' for chair. Did you mean"),
        ("{chair: {scenes: validation, max_new_tokens: 0}}", "must be at least 1"),
        ("coco", "the data must be tiny"),
    ],
)
def test_wrong_tuning_data_are_refused(text, message):
    with pytest.raises(ConfigError) as error:
        sources_of(text)
    assert message in str(error.value)


def test_options_without_effect_on_the_data_are_refused():
    for text, message in (
        ("{chair: {scenes: validation, columns: id=x}}", "--columns has no effect without"),
        ("{chair: {scenes: validation, images: .}}", "--images has no effect on the embedded"),
    ):
        with pytest.raises(ConfigError, match=message):
            gather(sources_of(text), None, n_images=4, n_held_out=4, seed=0)


def test_what_is_tuned_on_is_never_confirmed_on(image_folder, tmp_path):
    objects = tmp_path / "objects.json"
    objects.write_text(
        json.dumps({"names": ["car"], "objects": {f"scene_{i}.png": [0] for i in range(4)}})
    )
    sources = sources_of(f"{{chair: {{objects: {objects}, images: {image_folder}}}}}")
    material = gather(sources, None, n_images=2, n_held_out=9, seed=0)
    (tuning,), held_out = material.parts["chair"], material.held_out["chair"]
    clusters = [{item.cluster for item in task.items} for task in (tuning, held_out)]
    assert [len(part) for part in clusters] == [2, 2]
    assert not clusters[0] & clusters[1]
    with pytest.raises(DataError, match="show an image that is tuned on"):
        gather(sources, sources, n_images=2, n_held_out=4, seed=0)
    with pytest.raises(DataError, match="left to confirm the choice on"):
        gather(sources, None, n_images=4, n_held_out=2, seed=0)


# -- the study ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_the_front_keeps_the_constraints_and_holds_nothing_beaten(tmp_path, sampler):
    goals = f"{AIM}\nconstraints: {{recall: {{at_least: baseline - 8}}}}"
    with study_in(tmp_path, goals, n_trials=12, sampler=sampler) as study:
        work(study)
        front, complete = study.front(), study.complete()
        chosen = choose(study, study.goals, {"chair_i": 30.0, "recall": 83.3}, "compromise", None)
    assert len(complete) == 12
    feasible = [t.values for t in complete if t.values[1] >= 83.33 - 8]
    assert front
    assert len(feasible) < 12
    for trial in front:
        assert trial.values in feasible
        assert not any(a < trial.values[0] and b > trial.values[1] for a, b in feasible)
    assert chosen.number in [t.number for t in front]


def test_a_continued_study_tries_what_an_uninterrupted_one_tries(tmp_path):
    with study_in(tmp_path / "whole", n_trials=9) as whole:
        work(whole)
        expected = settings(whole)
    for n_trials in (2, 5, 9):
        with study_in(tmp_path / "pieces", n_trials=n_trials) as pieces:
            work(pieces)
            assert settings(pieces) == expected[:n_trials]


def _killed_in_the_third_trial(folder):
    def kill(methods, part):
        if len(meter.seen) == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    meter = FakeMeter(kill)
    with study_in(folder) as study:
        work(study, meter)


def test_a_killed_workers_trial_is_tried_again_by_the_next(tmp_path):
    child = multiprocessing.get_context("fork").Process(
        target=_killed_in_the_third_trial, args=(tmp_path / "killed",)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with (tmp_path / "killed" / JOURNAL_NAME).open("a") as journal:
        journal.write('{"op_code": 5, "torn')
    with study_in(tmp_path / "whole") as whole:
        work(whole)
        expected = settings(whole)
    with study_in(tmp_path / "killed") as study:
        work(study)
        assert settings(study) == expected
        assert len(study.complete()) == 6


def test_two_workers_share_a_study_and_try_different_settings(tmp_path):
    with study_in(tmp_path) as one, study_in(tmp_path) as other:
        claims = [worker._claim() for worker in (one, other, one, other)]
        assert len({trial.number for trial, _ in claims}) == 4
        assert len({methods for _, methods in claims}) == 4
        other.work(FakeMeter(), BASELINE, tell=lambda text: None, wait=False)
        assert len(other.trials()) == 6  # the four that are running count


def test_a_setting_that_another_worker_is_trying_is_not_tried_beside_it(tmp_path):
    choice = "{method: pai, gamma: 1.0, alpha: {choices: [0.2, 0.4]}}"
    with study_in(tmp_path, method=choice) as one, study_in(tmp_path, method=choice) as other:
        claims = [worker._claim() for worker in (one, other) * 3]
        assert len([methods for _, methods in claims if methods]) == 2
        refused = [t for t in one.trials() if REFUSED in t.user_attrs]
        assert len(refused) == 4


def test_hopeless_settings_are_given_up_early(tmp_path):
    goals = "objectives: {chair_i: min}\nconstraints: {recall: {at_least: baseline - 3}}"
    meter = FakeMeter()
    with study_in(tmp_path, goals, n_trials=8, prune=True) as study:
        work(study, meter)
        given_up = [t for t in study.trials() if "given_up" in t.user_attrs]
    assert any("violated beyond doubt" in t.user_attrs["given_up"] for t in given_up)
    assert len(meter.seen) < 8 * meter.n_parts
    assert all(t.params["pai.alpha"] > 0.4 for t in given_up if t.user_attrs["violations"][0] > 0)


def test_a_setting_that_the_model_refuses_is_recorded_and_the_study_goes_on(tmp_path):
    def refuse(methods, part):
        if methods[0].alpha > 0.5:
            raise UnsupportedModelError("too strong")

    said = []
    with study_in(tmp_path) as study:
        work(study, FakeMeter(refuse), said.append)
        refused = [t for t in study.trials() if REFUSED in t.user_attrs]
        assert refused
        assert len(study.trials()) == 6
    assert sum("refused: too strong" in line for line in said) == len(refused)


def test_another_study_in_the_folder_is_refused_and_nothing_is_written(tmp_path):
    with study_in(tmp_path, n_trials=2) as study:
        work(study)
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    other = study_in(tmp_path, "objectives: {recall: max}")
    with pytest.raises(ConfigError, match="holds another study: it differs in objectives"):
        other.__enter__()
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before


@pytest.mark.parametrize("is_copied_over", [True, False], ids=["beside its own", "alone"])
def test_the_journal_of_another_study_is_refused(tmp_path, is_copied_over):
    folder, other = tmp_path / "mine", tmp_path / "other"
    with study_in(other, "objectives: {recall: max}", n_trials=2) as study:
        work(study)
    if is_copied_over:
        with study_in(folder):
            pass
    folder.mkdir(exist_ok=True)
    shutil.copy(other / JOURNAL_NAME, folder / JOURNAL_NAME)
    with pytest.raises(ConfigError, match="is the journal of another study"):
        study_in(folder).__enter__()
    assert (folder / "study.json").exists() == is_copied_over


@pytest.mark.parametrize(
    "damage",
    [
        lambda journal: b"no journal\n" + journal,
        lambda journal: bytes(range(128, 256)),
        lambda journal: journal + b"no journal",
        lambda journal: journal + b"[1, 2]\n",
    ],
    ids=["before", "instead", "torn", "behind"],
)
def test_a_damaged_journal_is_named_and_left_as_it_is(tmp_path, damage):
    with study_in(tmp_path, n_trials=2) as study:
        work(study)
    path = tmp_path / JOURNAL_NAME
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"journal\.log is damaged"):
        study_in(tmp_path).__enter__()
    assert path.read_bytes() == damaged


def test_a_study_without_a_setting_within_the_constraints_says_so(tmp_path):
    goals = f"{AIM}\nconstraints: {{chair_i: {{at_most: 1}}}}"
    with study_in(tmp_path, goals, n_trials=3) as study:
        work(study)
        with pytest.raises(DataError, match="none of the 3 trials was completed within"):
            choose(study, study.goals, {"chair_i": 30.0, "recall": 83.3}, "compromise", None)
        with pytest.raises(ConfigError, match="--choose 7 is no complete trial"):
            choose(study, study.goals, {}, "compromise", 7)


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"vlm-steer\[tune\]"):
        study_in(tmp_path)


def test_differences_are_in_the_units_of_the_goals():
    (method,) = resolve({"method": "pai", "alpha": 1.0, "gamma": 1.0})
    entries = describe(goals_of(AIM), FakeMeter().whole((method,)), BASELINE, n_resamples=50)
    assert entries["recall"]["value"] == pytest.approx(100 * 20 / 60)
    assert entries["recall"]["difference"]["value"] == pytest.approx(-50.0)
    low, high = entries["chair_i"]["ci95"]
    assert low <= entries["chair_i"]["value"] <= high


# -- the file ----------------------------------------------------------------------------------

FILE = """
methods: [{method: pai, gamma: 1.0, alpha: {min: 0.1, max: 1.0}}]
tune:
  objectives: {chair_i: min}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tune:", "tuning:", "has methods:, some of whose options are ranges, and tune:"),
        ("{chair_i: min}", "{chair_i: min", "not valid YAML"),
        ("tune:", "tune:\n  trails: 3", "tune.yaml:4: unknown option 'trails' for tune. Did you"),
        ("tune:", "tune:\n  trials: 0", "tune.yaml:4: trials is 0; it must be at least 1"),
        ("tune:", "tune:\n  trials: many", "trials must be a whole number"),
        ("tune:", "tune:\n  sampler: grid", "sampler must be tpe, nsga2 or random"),
        ("tune:", "tune:\n  choose: recall", "choose is 'recall'; it must be one of compromise"),
        ("tune:", "tune:\n  temperature: -1.0", "must not be negative"),
        ("tune:", "tune:\n  data: {chair: {scenes: iid}}", "'iid' are a test split"),
        ("tune:", "extra: 1\ntune:", "unknown key 'extra'"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, old, new, message):
    path = tmp_path / "tune.yaml"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError) as error:
        read_plan(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("name", ["pai_captions.yaml", "vcd_answers.yaml"])
def test_the_files_of_the_package_are_found_by_name_and_are_no_presets(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = read_plan(Path(name))
    assert plan.options.data == "tiny"
    assert {path.name for path in find_preset("pai").parent.glob("tune/*")} >= {name}
    assert name.removesuffix(".yaml") not in list_presets()
