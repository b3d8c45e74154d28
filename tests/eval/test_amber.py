"""AMBER as published, and with its doubtful answers read."""

import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.benchmarks.amber import (
    AMBER_METRICS,
    Vocabulary,
    generative_counts,
    question_counts,
    read_caption,
)
from vlm_steer_eval.benchmarks.scoring_amber import load_similarity, score_amber

WORDS = Vocabulary(
    {"grass": ["ground"], "dog": ["puppy"], "sky": [], "cat": []}, frozenset({"line"})
)


@pytest.fixture
def cases(data_folder, golden, tmp_path):
    """The benchmark's folder and the reference answers to it.

    The reference answers some items twice, which we refuse; the second time they are items of their
    own here, with the same annotation.
    """
    nltk = pytest.importorskip("nltk", reason="the nltk extra is not installed")
    nltk.data.path.insert(0, str(data_folder / "nltk_data"))
    source = data_folder / "amber"
    folder = tmp_path / "amber"
    folder.mkdir()
    for name in ("relation.json", "safe_words.txt", "query"):
        (folder / name).symlink_to(source / name)
    annotations = json.loads((source / "annotations.json").read_text())
    by_id = {row["id"]: row for row in annotations}
    answers, seen = [], set()
    for number, item in enumerate(golden("amber.json")["items"]):
        name = item["id"]
        if name in seen:
            name = f"again {number}"
            annotations.append({**by_id[item["id"]], "id": name})
        seen.add(name)
        answers.append({"id": name, "response": item["response"]})
    (folder / "annotations.json").write_text(json.dumps(annotations))
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(answers))
    return folder, path


@pytest.fixture
def prefix_vectors(monkeypatch):
    """A spaCy whose words are alike when they begin alike."""

    class Word(str):
        def similarity(self, other):
            return 1.0 if self == other else 0.9 if self[:2] == other[:2] else 0.1

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: Word))


def _printed(stdout):
    """Numbers of the published script's output, by heading."""
    table, heading = {}, ""
    for line in stdout.splitlines():
        name, _, value = line.partition(":")
        if value.strip():
            table[heading][name] = float(value)
        elif name:
            heading = name
            table[heading] = {}
    return table


HEADINGS = {
    "Generative Task": "generative",
    "Descriminative Task": "discriminative",
    "Exsitence": "existence",
    "Attribute": "attribute",
    "State": "state",
    "Number": "number",
    "Action": "action",
    "Relation": "relation",
}


@pytest.mark.parametrize("similarity", ["exact", "prefix2"])
def test_published_numbers_are_reproduced(cases, golden, similarity, tmp_path, prefix_vectors):
    expected = golden("amber.json")[similarity]
    name = "exact" if similarity == "exact" else "spacy:prefix"
    result = score_amber(
        *cases,
        parser="official",
        similarity=name,
        missing="exclude",
        output=tmp_path / "out",
        n_resamples=20,
    )
    printed = {HEADINGS[key]: v for key, v in _printed(expected["by_type"]["a"]["stdout"]).items()}
    assert result["official"] == printed
    assert result["n"] == 238
    samples = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    ids = [str(row["id"]) for row in json.loads(cases[1].read_text())]
    by_id = {sample["id"]: sample for sample in samples}
    for name, item in zip(ids, expected["per_item"], strict=True):
        sample = by_id[name]
        if sample["type"] == "generative":
            assert len(sample["nouns"]) == item.get("chair_num", 0)
            assert len(sample["hallucinated"]) == item.get("chair_score", 0)
            assert len(sample["covered"]) == item.get("safe_cover_score", 0)
            assert len(sample["invented"]) == item.get("hallu_cover_score", 0)
        else:
            assert (sample["parsed"] == sample["label"]) == bool(item.get("qa_correct_score"))
    exact = {name: entry["value"] for name, entry in result["metrics"].items()}
    for metric in ("CHAIR", "Cover", "Hal", "Cog"):
        # The published denominators are 0.001 too large.
        assert 100 * exact[metric] == pytest.approx(
            expected["generative_unrounded"][metric], rel=1e-4
        )


@pytest.mark.parametrize("part", ["generative", "discriminative", "existence", "attribute"])
def test_a_part_alone_scores_as_within_the_whole(cases, part):
    whole = score_amber(*cases, missing="exclude", n_resamples=5)["official"]
    alone = score_amber(*cases, part=part, missing="exclude", n_resamples=5)["official"]
    assert alone[part] == whole[part]
    assert ("generative" in alone) == (part == "generative")


def test_an_untidy_no_counts_by_default_and_not_as_published(cases, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 8633, "response": "no."}\n{"id": 8634, "response": "gibberish"}\n')
    ours, official = (
        score_amber(cases[0], path, part="existence", parser=p, missing="exclude", n_resamples=5)
        for p in ("robust", "official")
    )
    assert ours["metrics"]["accuracy"]["value"] == 0.5
    assert ours["metrics"]["unparsed"]["value"] == 1
    assert official["metrics"]["accuracy"]["value"] == 0
    assert ours["n_images"] == 1  # both questions are about the first image


def test_an_associate_credits_the_word_that_lists_it():
    caption = read_caption(["ground", "line", "tree"], ["ground", "grass"], [], WORDS)
    assert caption.nouns == ("ground",)
    assert caption.covered == {1}
    assert not caption.hallucinated


def test_an_invented_word_is_forgiven_where_it_resembles_a_safe_one():
    alike = lambda a, b: 0.9  # noqa: E731
    strict = read_caption(["cat"], ["dog"], ["cat"], WORDS)
    assert (strict.hallucinated, strict.invented) == (("cat",), {0})
    assert not read_caption(["cat"], ["dog"], ["cat"], WORDS, alike).hallucinated


@given(st.lists(st.sampled_from(["grass", "ground", "dog", "puppy", "sky", "cat", "x"])))
def test_counts_stay_inside_their_wholes(nouns):
    row = dict(
        zip(
            AMBER_METRICS.columns,
            generative_counts(read_caption(nouns, ["grass", "dog"], ["cat"], WORDS)),
            strict=True,
        )
    )
    assert row["hallucinated"] <= row["nouns"] <= len(nouns)
    assert row["covered"] <= row["truth"] == 2
    assert row["cognised"] <= row["expected"] == 1


def test_a_question_fills_its_columns_only():
    row = dict(zip(AMBER_METRICS.columns, question_counts("no", "no", unread=False), strict=True))
    filled = {name for name, value in row.items() if value}
    assert filled == {"questions", "right", "said_no", "truth_no", "right_no"}


def test_bad_input_is_refused_with_a_way_out(cases, tmp_path):
    with pytest.raises(DataError, match="--missing exclude"):
        score_amber(*cases)
    with pytest.raises(ConfigError, match="generative"):
        score_amber(*cases, part="everything")
    with pytest.raises(ConfigError, match="spacy:MODEL"):
        load_similarity("glove")
    with pytest.raises(ConfigError, match="en_core_web_lg"):
        load_similarity("spacy:en_core_web_lg")
    with pytest.raises(DataError, match="annotations"):
        score_amber(tmp_path, cases[1])
