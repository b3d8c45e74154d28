"""Scores of AMBER answers from files."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.choices import AmberParser, AmberPart, Missing
from vlm_steer_eval.files import read_json, read_rows
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import summarise

from .amber import (
    AMBER_METRICS,
    DIMENSIONS,
    Caption,
    Similarity,
    Vocabulary,
    exact_similarity,
    generative_counts,
    official_numbers,
    question_counts,
    read_caption,
)
from .nltk_tools import Nltk, load_nltk
from .pope import Answer, parse_answer
from .questions import check_answered, load_texts, refuse_duplicates
from .scoring import summarise_parts, write_scores

__all__ = [
    "PARTS",
    "AmberItem",
    "ScoredItem",
    "dimension",
    "load_items",
    "load_queries",
    "load_similarity",
    "load_vocabulary",
    "score_amber",
    "score_item",
]

PARTS: tuple[str, ...] = get_args(AmberPart)
"""Parts of the benchmark that can be scored alone."""


@dataclass(frozen=True)
class AmberItem:
    """One annotated item: its type, its image, and what is true and what would be invented."""

    id: str
    type: str
    image: str
    truth: Any
    invented: Sequence[str]


@dataclass(frozen=True)
class ScoredItem:
    """A scored item: its counts, and its row of `samples.jsonl`."""

    item: AmberItem
    counts: list[int]
    row: dict[str, Any]


def score_amber(
    data: Path,
    answers: Path,
    *,
    part: str = "all",
    parser: AmberParser = "robust",
    similarity: str = "exact",
    output: Path | None = None,
    missing: Missing = "error",
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score captions and yes/no answers against AMBER's annotations.

    Args:
        data: the benchmark's data folder: `annotations.json`, `relation.json`, `safe_words.txt`,
            and `query/*.json`, which say which questions share an image.
        answers: rows with `id` and the text under `response`, `answer` or `text`.
        part: a name in `PARTS`.
        parser: how yes/no answers are read. `official` knows exactly "Yes" and "No"; every other
            text is wrong and no "no".
        similarity: `exact`, or `spacy:MODEL`, such as `spacy:en_core_web_lg`, which the published
            numbers use.
        output: folder for `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt`; None
            writes nothing.
        missing: what to do about items without an answer: stop, or leave them out and count them.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        The contents of `scores.json`.

    Raises:
        ConfigError: an option is unknown, or nltk, spaCy or their data are absent.
        DataError: a file cannot be used, or items lack an answer.
    """
    if part not in PARTS:
        raise ConfigError(f"--part {part!r} is unknown; choose one of {', '.join(PARTS)}")
    alike = load_similarity(similarity)
    items = load_items(data, part)
    given = load_texts(answers, ("id", "question_id"), ("response", "answer", "text"))
    unanswered = check_answered(
        answers,
        given,
        [item.id for item in items],
        asked=f"items of --part {part}",
        id_name="id ",
        advice="produce them, choose another --part, or pass --missing exclude to leave them out",
        missing=missing,
    )
    kept = [item for item in items if item.id in given]
    vocabulary = load_vocabulary(data)
    captions = any(item.type == "generative" for item in kept)
    nltk = load_nltk("scoring AMBER's captions", "pass --part discriminative") if captions else None
    scored = [score_item(item, given[item.id], vocabulary, nltk, parser, alike) for item in kept]
    counts = [entry.counts for entry in scored]
    clusters = [entry.item.image for entry in scored]
    result: dict[str, Any] = {
        "benchmark": "amber",
        "part": part,
        "parser": parser,
        "similarity": similarity,
        "n": len(kept),
        "n_images": len(set(clusters)),
        "metrics": summarise(AMBER_METRICS, counts, clusters, n_resamples=n_resamples, seed=seed),
        "categories": _categories(scored, n_resamples, seed),
        "official": _official(scored),
        "unanswered": unanswered,
        "unused_answers": len(given.keys() - {item.id for item in kept}),
        "images_known": all(not item.image.startswith("question ") for item in kept),
    }
    if output is not None:
        title = f"AMBER {part}, parser {parser}, similarity {similarity}, n = {len(kept)}"
        units = [Unit(e.item.id, e.item.image, dimension(e.item.type), e.counts) for e in scored]
        write_scores(output, result, [entry.row for entry in scored], units, title)
    return result


def load_similarity(name: str) -> Similarity:
    """`exact`, or the word vectors of `spacy:MODEL`.

    Raises:
        ConfigError: no such similarity, or spaCy or the model is not installed.
    """
    if name == "exact":
        return exact_similarity
    kind, _, model = name.partition(":")
    if kind != "spacy" or not model:
        raise ConfigError(
            f"--similarity {name!r} is unknown; give exact, or spacy:MODEL such as "
            "spacy:en_core_web_lg"
        )
    try:
        nlp = importlib.import_module("spacy").load(model)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"--similarity {name} needs spaCy and its model, and {error}; install both "
            f"(`pip install spacy`, `python -m spacy download {model}`), or use "
            "--similarity exact"
        ) from error
    document = cache(nlp)

    @cache
    def alike(first: str, second: str) -> float:
        return float(document(first).similarity(document(second)))

    return alike


def load_items(data: Path, part: str) -> list[AmberItem]:
    """The items of a part, from `annotations.json`.

    Raises:
        DataError: the file is malformed, an id occurs twice, or it holds none of that part.
    """
    images = {key: str(row["image"]) for key, row in _query_rows(data).items()}
    items = []
    for number, row in enumerate(read_rows(data / "annotations.json"), 1):
        kind, truth = row.get("type"), row.get("truth")
        listed = isinstance(truth, list) and isinstance(row.get("hallu"), list)
        if row.get("id") is None or not (listed if kind == "generative" else truth in _ANSWERS):
            raise DataError(
                f"{data / 'annotations.json'}, row {number}: expected id, type and truth (words "
                f"and 'hallu' for captions, yes or no for questions), found {row!r}"
            )
        if _belongs(str(kind), part):
            name = str(row["id"])
            image = images.get(name, f"image {name}" if listed else f"question {name}")
            items.append(AmberItem(name, str(kind), image, truth, row.get("hallu", ())))
    if not items:
        raise DataError(f"{data / 'annotations.json'} holds no items of --part {part}")
    refuse_duplicates(data / "annotations.json", [item.id for item in items])
    return items


_ANSWERS = ("yes", "no")


def _belongs(kind: str, part: str) -> bool:
    if part == "all":
        return True
    if part in DIMENSIONS:
        return kind in DIMENSIONS[part]
    return (kind == "generative") == (part == "generative")


def dimension(kind: str) -> str:
    """The part that an item belongs to: generative, existence, attribute or relation."""
    return next((part for part in PARTS[3:] if kind in DIMENSIONS[part]), "generative")


def load_queries(data: Path) -> dict[str, str]:
    """Item id -> what the model is asked, from whichever query files there are."""
    return {key: str(row.get("query", "")) for key, row in _query_rows(data).items()}


def _query_rows(data: Path) -> dict[str, dict[str, Any]]:
    return {
        str(row["id"]): row
        for path in sorted((data / "query").glob("*.json"))
        for row in read_rows(path)
        if row.get("id") is not None and row.get("image")
    }


def load_vocabulary(data: Path) -> Vocabulary:
    """The words of `relation.json` and `safe_words.txt`.

    Raises:
        DataError: a file cannot be used.
    """
    relations = read_json(data / "relation.json")
    if not isinstance(relations, dict):
        raise DataError(f"{data / 'relation.json'}: expected an object of word -> associates")
    try:
        words = (data / "safe_words.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{data / 'safe_words.txt'} cannot be read ({error}); --data takes the data folder of "
            "the benchmark"
        ) from error
    return Vocabulary(relations, frozenset(word.strip() for word in words if word.strip()))


def score_item(
    item: AmberItem,
    text: str,
    vocabulary: Vocabulary,
    nltk: Nltk | None,
    parser: AmberParser,
    similarity: Similarity,
) -> ScoredItem:
    """Score one caption or answer; see `score_amber`."""
    row: dict[str, Any] = {"id": item.id, "type": item.type, "image": item.image, "text": text}
    if nltk is not None and item.type == "generative":
        nouns = [
            nltk.lemma(word, nltk.wordnet.NOUN)
            for word, tag in nltk.tag(nltk.tokenise(text))
            if tag.startswith("NN")
        ]
        caption = read_caption(nouns, item.truth, item.invented, vocabulary, similarity)
        return ScoredItem(item, generative_counts(caption), row | _caption_row(caption, item))
    truth: Answer = "yes" if item.truth == "yes" else "no"
    answer = _read(text, truth, parser)
    counts = question_counts(answer, truth, unread=answer is None)
    return ScoredItem(item, counts, row | {"label": truth, "parsed": answer})


def _read(text: str, truth: Answer, parser: AmberParser) -> Answer | None:
    if parser == "robust":
        return parse_answer("robust", text, truth).answer
    if text == "Yes":
        return "yes"
    return "no" if text == "No" else None


def _caption_row(caption: Caption, item: AmberItem) -> dict[str, Any]:
    return {
        "nouns": list(caption.nouns),
        "hallucinated": list(caption.hallucinated),
        "covered": [item.truth[index] for index in sorted(caption.covered)],
        "invented": [item.invented[index] for index in sorted(caption.invented)],
    }


def _categories(scored: Sequence[ScoredItem], n_resamples: int, seed: int) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, types in DIMENSIONS.items():
        chosen = [entry for entry in scored if entry.item.type in types]
        if chosen:
            table |= summarise_parts(
                AMBER_METRICS,
                [entry.counts for entry in chosen],
                [entry.item.image for entry in chosen],
                [name] * len(chosen),
                n_resamples,
                seed,
            )
    return table


def _official(scored: Sequence[ScoredItem]) -> dict[str, dict[str, float]]:
    """What the published script prints for these answers under this parser and similarity."""
    questions = [entry for entry in scored if entry.item.type != "generative"]
    numbers = {
        "generative": official_numbers(
            _sums([entry for entry in scored if entry.item.type == "generative"])
        ),
        "discriminative": official_numbers(_sums(questions)),
    }
    for name, types in DIMENSIONS.items():
        sums = _sums([entry for entry in questions if entry.item.type in types])
        slack = 1e-3 if name == "existence" else 1e-4
        counters = 3 if name == "attribute" else 1
        numbers[name] = official_numbers(sums, counters=counters, slack=slack)
    return {name: values for name, values in numbers.items() if values}


def _sums(scored: Sequence[ScoredItem]) -> Mapping[str, float]:
    columns = AMBER_METRICS.columns
    rows = np.array([entry.counts for entry in scored], dtype=np.float64).reshape(-1, len(columns))
    return dict(zip(columns, rows.sum(0).tolist(), strict=True))
