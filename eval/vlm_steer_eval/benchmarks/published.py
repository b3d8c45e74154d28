"""AMBER, MME, HallusionBench and MMHal-Bench as tasks: their files as items, their rules as scores.

What counts is what the modules that score files count; here the answers come from a run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.choices import AmberParser, HallusionParser, MmeParser, MmhalReading
from vlm_steer_eval.files import read_rows
from vlm_steer_eval.running.images import FileImage, ImageSource, NoImage
from vlm_steer_eval.running.sources import require_folder, subset
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import MetricSet

from .amber import AMBER_METRICS, Similarity, Vocabulary
from .hallusionbench import (
    HALLUSION_METRICS,
    HallusionQuestion,
    cluster_counts,
    load_hallusion,
    read_hallusion,
    read_verdict,
    verdict_of,
)
from .hallusionbench import judge_prompt as hallusion_prompt
from .judge import Judge, RecordedJudge
from .mme import MME_METRICS, MmeRow, load_mme_questions, mme_counts, read_mme
from .mmhal import MMHAL_METRICS, judge_prompt, rating_counts, read_rating
from .nltk_tools import Nltk, load_nltk
from .scoring_amber import (
    AmberItem,
    dimension,
    load_items,
    load_queries,
    load_similarity,
    load_vocabulary,
    score_item,
)
from .tasks import YES_NO, Item, OneUnitPerItem, Scored

__all__ = [
    "AmberTask",
    "HallusionTask",
    "MmeTask",
    "MmhalTask",
    "amber_task",
    "hallusion_task",
    "mme_task",
    "mmhal_task",
]


@dataclass(frozen=True)
class AmberTask(OneUnitPerItem):
    """AMBER; `gold["amber"]` is the annotated item."""

    items: Sequence[Item]
    vocabulary: Vocabulary
    nltk: Nltk | None
    parser: AmberParser
    similarity: str
    alike: Similarity
    part: str
    name: str = "amber"
    metrics: MetricSet = AMBER_METRICS
    first_token_words: tuple[Sequence[str], Sequence[str]] = YES_NO

    @property
    def scoring(self) -> Mapping[str, Any]:
        """Part, parser and similarity."""
        return {"part": self.part, "parser": self.parser, "similarity": self.similarity}

    def score(self, item: Item, text: str) -> Scored:
        """Score a caption or an answer."""
        annotated: AmberItem = item.gold["amber"]
        found = score_item(annotated, text, self.vocabulary, self.nltk, self.parser, self.alike)
        return Scored(found.counts, {k: v for k, v in found.row.items() if k not in _OWN})


_OWN = ("id", "image", "text")


def amber_task(
    data: Path,
    images: Path,
    *,
    part: str = "all",
    parser: AmberParser = "robust",
    similarity: str = "exact",
    limit: int | None = None,
    seed: int = 0,
    suffix: str = "",
) -> AmberTask:
    """AMBER from its data folder and its images.

    Args:
        data: see `vlm_steer_eval.scoring_amber.score_amber`; its query files are needed.
        images: folder of `AMBER_1.jpg`, ...
        part: a name in `vlm_steer_eval.scoring_amber.PARTS`.
        parser: how yes/no answers are read.
        similarity: of words.
        limit: number of images; None for all.
        seed: seed of their choice.
        suffix: appended to yes/no questions.

    Raises:
        ConfigError: an option is unknown, or nltk, spaCy or their data are absent.
        DataError: a file cannot be used, or an item has no query.
    """
    require_folder(images)
    alike = load_similarity(similarity)
    queries = load_queries(data)
    annotated = load_items(data, part)
    silent = [item.id for item in annotated if not queries.get(item.id)]
    if silent:
        raise DataError(
            f"{data / 'query'} has no query for {len(silent)} of the {len(annotated)} items of "
            f"--part {part}; put the benchmark's query files there"
        )
    items = [
        Item(
            id=item.id,
            image=FileImage(images / item.image),
            prompt=queries[item.id] + (suffix if item.type != "generative" else ""),
            split=dimension(item.type),
            cluster=item.image,
            gold={"amber": item, **_plain_truth(item)},
        )
        for item in annotated
    ]
    captions = any(item.type == "generative" for item in annotated)
    nltk = load_nltk("scoring AMBER's captions", "pass --part discriminative") if captions else None
    return AmberTask(
        _limited(items, limit, seed),
        load_vocabulary(data),
        nltk,
        parser,
        similarity,
        alike,
        part,
    )


def _plain_truth(item: AmberItem) -> dict[str, str]:
    if isinstance(item.truth, str):
        return {"label": item.truth}
    return {"truth": ", ".join(item.truth)}


@dataclass(frozen=True)
class MmeTask:
    """MME; `gold` has `label` and the `pair` that the question belongs to."""

    items: Sequence[Item]
    parser: MmeParser = "robust"
    name: str = "mme"
    metrics: MetricSet = MME_METRICS
    first_token_words: tuple[Sequence[str], Sequence[str]] = YES_NO

    @property
    def scoring(self) -> Mapping[str, Any]:
        """The parser's name."""
        return {"parser": self.parser}

    def score(self, item: Item, text: str) -> Scored:
        """Read one answer."""
        label = item.gold["label"]
        return Scored((), {"label": label, "parsed": read_mme(self.parser, text, label)})

    def units(self, scores: Mapping[str, Scored]) -> list[Unit]:
        """One unit per image with both of its questions answered."""
        return [
            Unit(
                name,
                pair[0].cluster,
                pair[0].split,
                mme_counts(
                    pair[0].split,
                    [item.gold["label"] for item in pair],
                    [scores[item.id].details["parsed"] for item in pair],
                ),
            )
            for name, pair in _grouped(self.items, scores).items()
            if len(pair) == 2
        ]


def _grouped(items: Sequence[Item], scores: Mapping[str, Scored]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        if item.id in scores:
            groups.setdefault(item.gold["pair"], []).append(item)
    return groups


def mme_task(
    questions: Path,
    images: Path,
    *,
    parser: MmeParser = "robust",
    limit: int | None = None,
    seed: int = 0,
    suffix: str = "",
    remove: str = "",
) -> MmeTask:
    """MME from its question files and its images.

    Args:
        questions: folder of TASK.txt, whose lines are image, question and label between tabs.
        images: folder with one folder per task, of images or of a folder `images`.
        parser: how answers are read.
        limit: number of images; None for all.
        seed: seed of their choice.
        suffix: appended to every question.
        remove: cut off the end of every question first, such as " Please answer yes or no."

    Raises:
        DataError: a file is malformed, or `remove` is not the end of a question.
    """
    require_folder(images)
    items = [
        Item(
            id=f"{pair}/{turn}",
            image=FileImage(_mme_image(images, row)),
            prompt=_without(row, remove) + suffix,
            split=row.task,
            cluster=f"{row.task}/{row.image}",
            gold={"label": row.label, "pair": pair},
        )
        for pair, rows in load_mme_questions(questions).items()
        for turn, row in enumerate(rows)
    ]
    return MmeTask(_limited(items, limit, seed), parser)


def _without(row: MmeRow, ending: str) -> str:
    if not row.question.endswith(ending):
        raise DataError(
            f"MME, {row.task}: the question {row.question!r} does not end with {ending!r}; check "
            "--remove"
        )
    return row.question.removesuffix(ending)


def _mme_image(folder: Path, row: MmeRow) -> Path:
    nested = folder / row.task / "images" / row.image
    return nested if nested.is_file() else folder / row.task / row.image


@dataclass(frozen=True)
class HallusionTask:
    """HallusionBench; `gold["question"]` is the question."""

    items: Sequence[Item]
    parser: HallusionParser = "robust"
    images_only: bool = False
    judge: Judge | None = None
    name: str = "hallusionbench"
    metrics: MetricSet = HALLUSION_METRICS
    first_token_words: tuple[Sequence[str], Sequence[str]] = YES_NO

    @property
    def scoring(self) -> Mapping[str, Any]:
        """Parser, judge, and whether only questions with a picture are asked."""
        judge = None if self.judge is None else self.judge.name
        return {"parser": self.parser, "images_only": self.images_only, "judge": judge}

    def score(self, item: Item, text: str) -> Scored:
        """Read one answer, or ask the judge about it."""
        label = item.gold["label"]
        answer = read_hallusion(self.parser, text, label)
        details = {"label": label, "parsed": answer, "verdict": verdict_of(answer, label)}
        if self.judge is not None:
            prompt = hallusion_prompt(item.gold["question"], text)
            reply = self.judge.ask({item.id: prompt})[item.id]
            details |= {"verdict": read_verdict(reply), "reply": reply}
        return Scored((), details)

    def units(self, scores: Mapping[str, Scored]) -> list[Unit]:
        """One unit per set of pictures that is complete."""
        sets: dict[str, list[Item]] = {}
        for item in self.items:
            sets.setdefault(item.cluster, []).append(item)
        whole = [i for members in sets.values() if _all_in(members, scores) for i in members]
        rows = cluster_counts(
            [item.gold["question"] for item in whole],
            [scores[item.id].details["verdict"] for item in whole],
        )
        return [Unit(name, name, name.partition("_")[0], row) for name, row in rows.items()]


def _all_in(items: Iterable[Item], scores: Mapping[str, Scored]) -> bool:
    return all(item.id in scores for item in items)


def hallusion_task(
    questions: Path,
    images: Path,
    *,
    parser: HallusionParser = "robust",
    images_only: bool = False,
    judge: Judge | None = None,
    limit: int | None = None,
    seed: int = 0,
    suffix: str = "",
) -> HallusionTask:
    """HallusionBench, its questions without a picture included.

    Args:
        questions: `HallusionBench.json`.
        images: the folder that its file names are relative to.
        parser: how answers are read.
        images_only: leave out the questions without a picture, as lmms-eval and VLMEvalKit do.
        judge: who says whether an answer is correct; it must be one that can be asked. None reads
            it by the parser.
        limit: number of sets of pictures; None for all.
        seed: seed of their choice.
        suffix: appended to every question.

    Raises:
        ConfigError: the judge is a recorded file.
        DataError: the file is malformed.
    """
    require_folder(images)
    _refuse_recorded(judge)
    items = [
        Item(
            id=question.id,
            image=_hallusion_image(questions, images, question),
            prompt=question.text + suffix,
            split=question.category,
            cluster=question.cluster,
            gold={"label": question.label, "question": question},
        )
        for question in load_hallusion(questions)
        if not (images_only and question.is_blind)
    ]
    return HallusionTask(_limited(items, limit, seed), parser, images_only, judge)


def _hallusion_image(path: Path, images: Path, question: HallusionQuestion) -> ImageSource:
    if question.is_blind:
        return NoImage()
    if not question.filename:
        raise DataError(f"{path}: {question.id} has no filename; give the benchmark's own file")
    return FileImage(images / question.filename)


def _refuse_recorded(judge: Judge | None) -> None:
    if isinstance(judge, RecordedJudge):
        raise ConfigError(
            "--judge recorded:FILE holds replies to answers that exist; give a judge that can be "
            "asked, or score the answers of this run with `vlm-steer score`"
        )


@dataclass(frozen=True)
class MmhalTask(OneUnitPerItem):
    """MMHal-Bench, rated by a judge; `gold["row"]` is the row of its template."""

    items: Sequence[Item]
    judge: Judge
    reading: MmhalReading = "robust"
    name: str = "mmhal"
    metrics: MetricSet = MMHAL_METRICS
    first_token_words: None = None

    @property
    def scoring(self) -> Mapping[str, Any]:
        """The judge and how its replies are read."""
        return {"judge": self.judge.name, "reading": self.reading}

    def score(self, item: Item, text: str) -> Scored:
        """Ask the judge about one answer."""
        prompt = judge_prompt({**item.gold["row"], "model_answer": text})
        reply = self.judge.ask({item.id: prompt})[item.id]
        rating = read_rating(reply, self.reading)
        note = "unrated" if rating is None else f"rated {rating}"
        return Scored(rating_counts(rating), {"reply": reply, "rating": rating, "note": note})


def mmhal_task(
    template: Path,
    images: Path,
    judge: Judge,
    *,
    reading: MmhalReading = "robust",
    limit: int | None = None,
    seed: int = 0,
) -> MmhalTask:
    """MMHal-Bench from its template and its images.

    Args:
        template: `response_template.json`.
        images: folder of the images, called as in `image_src`.
        judge: who rates; it must be one that can be asked.
        reading: how ratings are read.
        limit: number of images; None for all.
        seed: seed of their choice.

    Raises:
        ConfigError: the judge is a recorded file, whose replies know nothing of new answers.
        DataError: the file is malformed.
    """
    require_folder(images)
    _refuse_recorded(judge)
    items = []
    for index, row in enumerate(read_rows(template)):
        source = row.get("image_src")
        texts = (row.get("question"), row.get("gt_answer"), source)
        if not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{template}, row {index + 1}: expected texts under question, gt_answer and "
                f"image_src, found {row!r}"
            )
        items.append(
            Item(
                id=str(index),
                image=FileImage(images / str(source).rpartition("/")[2]),
                prompt=str(row["question"]),
                split=str(row.get("question_type", "all")),
                cluster=str(row.get("image_id", index)),
                gold={"row": row, "truth": row["gt_answer"]},
            )
        )
    return MmhalTask(_limited(items, limit, seed), judge, reading)


def _limited(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    chosen = set(subset((item.cluster for item in items), limit, seed))
    return [item for item in items if item.cluster in chosen]
