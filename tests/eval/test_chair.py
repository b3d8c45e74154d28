"""CHAIR under the published rule and under our table."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.benchmarks.chair import CHAIR_METRICS, TableNormaliser, score_caption
from vlm_steer_eval.benchmarks.chair_opera import load_opera_normaliser
from vlm_steer_eval.benchmarks.objects import load_object_sets, objects_from_annotations
from vlm_steer_eval.benchmarks.scoring import make_normaliser
from vlm_steer_eval.benchmarks.vocabulary import ObjectVocabulary, plural
from vlm_steer_eval.files import image_key, read_json, read_rows
from vlm_steer_eval.statistics.metrics import summarise

TABLE = TableNormaliser(ObjectVocabulary.coco())


@pytest.fixture(scope="module")
def opera(data_folder):
    nltk = pytest.importorskip("nltk", reason="the nltk extra is not installed")
    nltk.data.path.insert(0, str(data_folder / "nltk_data"))
    return load_opera_normaliser(data_folder / "chair/synonyms.txt")


def _values(scores, images):
    table = summarise(CHAIR_METRICS, [s.counts() for s in scores], images, n_resamples=20)
    return {name: entry["value"] for name, entry in table.items()}


def _objects(caption, normaliser=TABLE):
    return [mention.object for mention in normaliser.read(caption).mentions]


def test_phrases_are_read_as_the_originals_read_them(opera, golden):
    for row in golden("chair/caption_to_words.json"):
        reading = opera.read(row["text"])
        assert [m.surface for m in reading.mentions] == row["opera"]["words"], row["text"]
        assert [m.object for m in reading.mentions] == row["opera"]["node_words"]
        assert [m.token for m in reading.mentions] == row["opera"]["idxs"]
        assert [m.word for m in reading.mentions] == row["pai"]["idxs"]
        assert list(reading.words) == row["opera"]["merged"]


def test_made_up_captions_score_as_published_from_coco_annotations(opera, golden, golden_folder):
    expected = golden("chair/expected.json")["results"]
    captions = read_rows(golden_folder / "chair/captions.jsonl")
    images = [image_key(row["image_id"]) for row in captions]
    truth = objects_from_annotations(golden_folder / "chair/annotations", opera, set(images))
    assert {image: sorted(names) for image, names in truth.items()} == expected["opera"]["gt"]
    scores = [
        score_caption(opera.read(row["caption"]), truth.get(image, frozenset()))
        for row, image in zip(captions, images, strict=True)
    ]
    values = _values(scores, images)
    for name, value in expected["pai"]["overall_metrics"].items():
        assert values[name] == pytest.approx(value * (100 if name == "Len" else 1), rel=1e-14)
    sentences = zip(
        scores, expected["opera"]["sentences"], expected["pai"]["sentences"], strict=True
    )
    for score, by_token, by_word in sentences:
        pairs = [[m.surface, m.object] for m in score.hallucinated]
        assert pairs == by_token["mscoco_hallucinated_words"]
        assert [m.token for m in score.hallucinated] == by_token["hallucination_idxs"]
        assert [m.word for m in score.hallucinated] == by_word["hallucination_idxs"]


def test_a_lemma_table_makes_the_rule_that_of_another_tool(opera, golden, data_folder, tmp_path):
    rows = golden("chair/caption_to_words.json")
    plain = [r for r in rows if len(r["nltk_tokens"]) == len(r["pattern_py3"]["merged"])]
    pairs = {
        (token, lemma)
        for row in plain
        for token, lemma in zip(row["nltk_tokens"], row["pattern_py3"]["merged"], strict=True)
    }
    table = tmp_path / "lemmas.tsv"
    table.write_text("".join(f"{word}\t{lemma}\n" for word, lemma in sorted(pairs)))
    synonyms = data_folder / "chair/synonyms.txt"
    original = load_opera_normaliser(synonyms, table)
    known = {word for word, _ in pairs}
    checked = [row for row in rows if known >= set(row["nltk_tokens"])]
    assert len(checked) > 100
    for row in checked:
        mentions = original.read(row["text"]).mentions
        assert [m.surface for m in mentions] == row["pattern_py3"]["words"], row["text"]
        assert [m.object for m in mentions] == row["pattern_py3"]["node_words"]
    men = "Two men ride buses."
    assert [m.object for m in opera.read(men).mentions] == ["bus"]
    assert [m.object for m in original.read(men).mentions] == ["person"]
    assert original.name.startswith("opera, lemmas ")
    table.write_text("men\tman\nmen\tmen\n")
    with pytest.raises(DataError, match="line 2"):
        load_opera_normaliser(synonyms, table)
    with pytest.raises(ConfigError, match="--lemmas has no effect"):
        make_normaliser("table", None, table)


@pytest.mark.parametrize(
    "file",
    [
        "cca_llava-v1.5-7b_coco_chair_short_ans.jsonl",
        pytest.param("opera_llava-1.5_greedy.jsonl", marks=pytest.mark.slow),
        pytest.param("opera_minigpt4_beam5.jsonl", marks=pytest.mark.slow),
        pytest.param("lessismore_r1-llava1.5-7b.jsonl", marks=pytest.mark.slow),
        pytest.param("lessismore_r2-vcd.jsonl", marks=pytest.mark.slow),
    ],
)
def test_published_captions_score_as_published(opera, golden, data_folder, file):
    expected = golden("chair/real_expected.json")["files"][file]["nltk"]
    per_caption = golden("chair/real_per_caption_nltk.json.gz")[file]
    truth = load_object_sets(data_folder / "chair/coco_objects_nltk.json.gz")
    captions = read_rows(data_folder / "chair/captions" / file)
    images = [image_key(row["image_id"]) for row in captions]
    scores = [
        score_caption(opera.read(row["caption"]), truth[image])
        for row, image in zip(captions, images, strict=True)
    ]
    values = _values(scores, images)
    for name in ("CHAIRs", "CHAIRi", "Recall", "Precision", "F1"):
        assert values[name] == expected[name]
    assert values["Len"] / 100 == pytest.approx(expected["Len"], rel=1e-14)
    for score, row in zip(scores, per_caption, strict=True):
        assert [m.object for m in score.reading.mentions] == row["n"]
        assert [[m.surface, m.object] for m in score.hallucinated] == row["h"]
        assert [m.word for m in score.hallucinated] == row["hi"]


def test_table_verdicts_stay_close_to_the_published_rule_on_real_captions(opera, data_folder):
    truth = load_object_sets(data_folder / "chair/coco_objects_nltk.json.gz")
    captions = read_rows(data_folder / "chair/captions/opera_llava-1.5_greedy.jsonl")[:80]
    verdicts = [
        [
            bool(
                score_caption(
                    rule.read(row["caption"]), truth[image_key(row["image_id"])]
                ).hallucinated
            )
            for row in captions
        ]
        for rule in (TABLE, opera)
    ]
    differing = sum(a != b for a, b in zip(*verdicts, strict=True))
    assert differing <= 5


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("men, buses and knives; geese", ["person", "bus", "knife", "bird"]),
        ("Wine glasses beside a WINE GLASS", ["wine glass", "wine glass"]),
        ("a hot-dog, two hot dogs and a dog", ["hot dog", "hot dog", "dog"]),
        ("an orange cat eats oranges and an orange.", ["cat", "orange", "orange"]),
        ("a baby elephant and a baby", ["elephant", "person"]),
        ("train tracks near the train station", []),
        ("the train station has a train", ["train"]),
        ("a couple of apples for the couple", ["apple", "person"]),
        ("the woman’s umbrella", ["person", "umbrella"]),
        ("seated trainers are booking", []),
        ("a toilet seat", ["toilet"]),
        ("a tv", ["tv"]),
        ("", []),
        ("只有一只狗", []),
    ],
)
def test_table_reads_plurals_phrases_and_senses(caption, objects):
    assert _objects(caption) == objects


@given(st.text(max_size=80))
def test_table_spans_point_at_the_words_they_name(text):
    for mention in TABLE.read(f"a dog, {text} two cats").mentions:
        start, end = mention.span
        assert f"a dog, {text} two cats"[start:end].strip()


def test_shipped_table_holds_every_category_its_plural_and_no_ambiguity(data_folder):
    vocabulary = ObjectVocabulary.coco()
    assert len(vocabulary.names) == 80
    for name in vocabulary.names:
        assert vocabulary.surfaces[tuple(name.split(" "))] == name
        assert vocabulary.surfaces[tuple(plural(name).split(" "))] == name
    assert not vocabulary.ignored & set(vocabulary.surfaces)
    for allowed in vocabulary.qualifiers.values():
        assert allowed <= set(vocabulary.names)
    published = read_json(data_folder / "chair/coco_objects_nltk.json.gz")["names"]
    assert set(published) == set(vocabulary.names)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("bus", "buses"),
        ("wine glass", "wine glasses"),
        ("knife", "knives"),
        ("puppy", "puppies"),
        ("monkey", "monkeys"),
        ("policeman", "policemen"),
        ("human", "humans"),
        ("bench", "benches"),
        ("scissors", "scissors"),
        ("child", "children"),
    ],
)
def test_plurals_follow_english(word, expected):
    assert plural(word) == expected


def test_a_synonyms_file_gives_the_table_its_surfaces_and_their_plurals(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("dog, puppy\ncake,  cheesecake \n\n")
    rule = TableNormaliser(ObjectVocabulary.from_synonyms(path))
    assert _objects("puppies, dogs, cheesecake and a cat", rule) == ["dog", "dog", "cake"]


def test_an_empty_caption_counts_as_a_caption_without_mentions():
    values = _values([score_caption(TABLE.read(""), {"dog"})], ["1"])
    assert values["CHAIRs"] == 0
    assert values["CHAIRi"] is None
    assert values["Precision"] is None
    assert values["Recall"] == 0


def test_missing_annotation_files_are_named_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        objects_from_annotations(tmp_path / "none", TABLE, {"1"})
    with pytest.raises(DataError, match=r"instances_val2014\.json.*--objects"):
        objects_from_annotations(tmp_path, TABLE, {"1"})
    instances = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 1}],
    }
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    with pytest.raises(DataError, match=r"no captions_val2014\.json.*--objects"):
        objects_from_annotations(tmp_path, TABLE, {"1"})
    captions = {
        "images": [{"id": 1}],
        "annotations": [{"image_id": 1, "caption": "two cats"}, {"image_id": 2, "caption": "cow"}],
    }
    (tmp_path / "captions_val2014.json").write_text(json.dumps(captions))
    assert objects_from_annotations(tmp_path, TABLE, {"1"}) == {"1": {"dog", "cat"}}
    instances["categories"][0]["name"] = "dragon"
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    with pytest.raises(DataError, match="dragon"):
        objects_from_annotations(tmp_path, TABLE, {"1"})
    (tmp_path / "instances_val2014.json").write_text("{}")
    with pytest.raises(DataError, match="not a COCO annotation file"):
        objects_from_annotations(tmp_path, TABLE, {"1"})


def test_opera_rule_without_nltk_or_its_data_says_how_to_get_them(tmp_path, monkeypatch):
    synonyms = tmp_path / "synonyms.txt"
    synonyms.write_text("dog, puppy\n")
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ConfigError, match=r"pip install vlm-steer\[nltk\]"):
        load_opera_normaliser(synonyms)
    monkeypatch.undo()
    nltk = pytest.importorskip("nltk", reason="the nltk extra is not installed")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    with pytest.raises(ConfigError, match="NLTK_DATA"):
        load_opera_normaliser(synonyms)
