"""Commands that score answers and captions from files."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_steer_eval.choices import (
    AmberPart,
    UnknownImages,
)

from .groups import AnswerOptions, ScoreOptions, spelled_out
from .options import (
    AmberParserOption,
    AmberSimilarity,
    BeafParserOption,
    HallusionJudge,
    HallusionParserOption,
    ImagesOnly,
    Lemmas,
    MmeParserOption,
    MmvpParserOption,
    NormaliserOption,
    OpopeReaderOption,
    ParserOption,
    RatingOption,
    Synonyms,
)
from .run import chosen_judge

__all__ = [
    "score_amber",
    "score_beaf",
    "score_chair",
    "score_hallusionbench",
    "score_mme",
    "score_mmhal",
    "score_mmvp",
    "score_opope",
    "score_pope",
]


@spelled_out()
def score_pope(
    questions: Annotated[Path, typer.Option("--questions", help="POPE file with labels.")],
    answers: Annotated[
        Path,
        typer.Option("--answers", help="Rows with question_id and answer (or text)."),
    ],
    results: AnswerOptions,
    parser: ParserOption = "robust",
) -> None:
    """Score yes/no answers against a POPE file, joined by question id."""
    from vlm_steer_eval.benchmarks import scoring
    from vlm_steer_eval.reports.tables import metric_table, parser_line, render

    result = scoring.score_pope(
        questions,
        answers,
        parser=parser,
        **results.keywords(),
    )
    title = f"POPE, parser {parser}, n = {result['n']}"
    typer.echo(render(metric_table(result["metrics"], title)), nl=False)
    typer.echo(parser_line(result["parsers"], parser))
    if result["unanswered"]:
        _note(f"{len(result['unanswered'])} questions without an answer were left out")
    if result["unused_answers"]:
        _note(f"{result['unused_answers']} answers belong to no question of {questions}")
    unparsed = result["metrics"]["unparsed"]["value"]
    if parser == "spin" and unparsed:
        _note(
            f"{unparsed} answers were dropped; the original then pairs the answers after each with "
            "the wrong label, which joining by id does not repeat"
        )


@spelled_out()
def score_chair(
    captions: Annotated[Path, typer.Option("--captions", help="Rows with image_id and caption.")],
    results: ScoreOptions,
    objects: Annotated[
        Path | None, typer.Option("--objects", help="Object sets per image, JSON or .gz.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="Folder of COCO annotations instead.")
    ] = None,
    synonyms: Synonyms = None,
    lemmas: Lemmas = None,
    normaliser: NormaliserOption = "table",
    unknown_images: Annotated[
        UnknownImages | None,
        typer.Option(
            "--unknown-images",
            help="Captions of images without ground truth: error for table; opera counts them "
            "as images without objects, as published.",
        ),
    ] = None,
) -> None:
    """Score captions against the objects of their images."""
    from vlm_steer_eval.benchmarks import scoring
    from vlm_steer_eval.reports.tables import metric_table, render

    result = scoring.score_chair(
        captions,
        objects=objects,
        annotations=annotations,
        synonyms=synonyms,
        lemmas=lemmas,
        normaliser=normaliser,
        unknown_images=unknown_images,
        **results.keywords(),
    )
    title = f"CHAIR, normaliser {normaliser}"
    typer.echo(render(metric_table(result["metrics"], title)), nl=False)
    unknown = result["unknown_images"]
    if unknown["images"]:
        treated = {"empty": "counted as images without objects", "exclude": "left out"}
        _note(
            f"{len(unknown['images'])} images without ground truth were "
            f"{treated[unknown['policy']]}"
        )
    if result["empty_captions"]:
        _note(f"{result['empty_captions']} captions are empty and count as free of hallucination")
    if result["images_with_several_captions"]:
        _note(f"{result['images_with_several_captions']} images have more than one caption")


@spelled_out()
def score_amber(
    data: Annotated[
        Path,
        typer.Option(
            "--data", help="Folder of annotations.json, relation.json, safe_words.txt, query/."
        ),
    ],
    answers: Annotated[Path, typer.Option("--answers", help="Rows with id and response.")],
    results: AnswerOptions,
    part: Annotated[AmberPart, typer.Option("--part", help="What to score.")] = "all",
    parser: AmberParserOption = "robust",
    similarity: AmberSimilarity = "exact",
) -> None:
    """Score captions and yes/no answers against AMBER's annotations."""
    from vlm_steer_eval.benchmarks.scoring_amber import score_amber as score

    result = score(
        data,
        answers,
        part=part,
        parser=parser,
        similarity=similarity,
        **results.keywords(),
    )
    _show(result, f"AMBER {part}, parser {parser}, similarity {similarity}")
    _note_unanswered(result)
    if similarity == "exact" and result["metrics"]["CHAIR"]["value"] is not None:
        _note("published captions' scores use --similarity spacy:en_core_web_lg")
    if not result["images_known"]:
        _note(
            "without the query files, every question counts as an image of its own and intervals "
            "are too narrow"
        )


@spelled_out()
def score_mme(
    answers: Annotated[
        Path,
        typer.Option(
            "--answers", help="Folder of TASK.txt, or rows with task, image, label, answer."
        ),
    ],
    results: ScoreOptions,
    parser: MmeParserOption = "robust",
) -> None:
    """Score answers to MME; perception, cognition and hallucination are points."""
    from vlm_steer_eval.benchmarks.mme import score_mme as score

    result = score(answers, parser=parser, **results.keywords())
    _show(result, f"MME, parser {parser}, n = {result['n']}")
    if result["absent_tasks"]:
        _note(f"without answers: {', '.join(result['absent_tasks'])}; their totals are undefined")


@spelled_out()
def score_hallusionbench(
    questions: Annotated[Path, typer.Option("--questions", help="HallusionBench.json.")],
    answers: Annotated[
        Path,
        typer.Option("--answers", help="Rows with the question's ids and model_prediction."),
    ],
    results: AnswerOptions,
    parser: HallusionParserOption = "robust",
    images_only: ImagesOnly = False,
    judge: HallusionJudge = None,
) -> None:
    """Score HallusionBench by the yes or no in the answers, or by a judge."""
    from vlm_steer_eval.benchmarks.hallusionbench import score_hallusionbench as score

    rater = None if judge is None else chosen_judge(judge, results.output)
    result = score(
        questions,
        answers,
        parser=parser,
        images_only=images_only,
        judge=rater,
        **results.keywords(),
    )
    rule = f"parser {parser}" if rater is None else f"judge {rater.name}"
    _show(result, f"HallusionBench, {rule}, n = {result['n']}")
    _note_unanswered(result)
    if rater is None:
        _note("published scores come from a GPT-4 judge and are not comparable with these")


@spelled_out()
def score_opope(
    captions: Annotated[Path, typer.Option("--captions", help="Rows with image_id and caption.")],
    questions: Annotated[Path, typer.Option("--questions", help="POPE file with labels.")],
    results: AnswerOptions,
    reader: OpopeReaderOption = "table",
) -> None:
    """Answer POPE's questions from one caption per image."""
    from vlm_steer_eval.benchmarks.opope import score_opope as score

    result = score(
        captions,
        questions,
        reader=reader,
        **results.keywords(),
    )
    _show(result, f"OPOPE, reader {reader}, n = {result['n']}")
    if result["images_without_caption"]:
        _note(f"{len(result['images_without_caption'])} images without a caption were left out")


@spelled_out()
def score_beaf(
    questions: Annotated[
        Path,
        typer.Option("--questions", help="Rows with id, image, question, gt, orig_img, removed_q."),
    ],
    answers: Annotated[Path, typer.Option("--answers", help="Rows with id and answer.")],
    results: ScoreOptions,
    parser: BeafParserOption = "robust",
) -> None:
    """Score how answers change when an object is taken out of the picture."""
    from vlm_steer_eval.benchmarks.beaf import score_beaf as score

    result = score(questions, answers, parser=parser, **results.keywords())
    _show(result, f"BEAF, parser {parser}, n = {result['n']}")


@spelled_out()
def score_mmhal(
    responses: Annotated[
        Path, typer.Option("--responses", help="The benchmark's template with model_answer.")
    ],
    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            help="recorded:FILE, hf:MODEL, or endpoint:MODEL@URL (key in VLM_STEER_JUDGE_KEY).",
        ),
    ],
    results: ScoreOptions,
    reading: RatingOption = "robust",
) -> None:
    """Score MMHal-Bench by a judge; replies of an endpoint are kept in the output folder."""
    from vlm_steer_eval.benchmarks.mmhal import score_mmhal as score

    rater = chosen_judge(judge, results.output)
    result = score(responses, rater, reading=reading, **results.keywords())
    _show(result, f"MMHal-Bench, judge {rater.name}, n = {result['n']}")
    if result["metrics"]["unrated"]["value"]:
        _note(f"{result['metrics']['unrated']['value']} replies hold no rating and were left out")


@spelled_out()
def score_mmvp(
    questions: Annotated[Path, typer.Option("--questions", help="Questions.csv.")],
    answers: Annotated[Path, typer.Option("--answers", help="Rows with id and answer.")],
    results: AnswerOptions,
    parser: MmvpParserOption = "robust",
) -> None:
    """Score MMVP: a pair counts if both of its questions are answered correctly."""
    from vlm_steer_eval.benchmarks.mmvp import score_mmvp as score

    result = score(questions, answers, parser=parser, **results.keywords())
    _show(result, f"MMVP, parser {parser}, n = {result['n']}")
    _note_unanswered(result)


def _show(result: dict[str, Any], title: str) -> None:
    from vlm_steer_eval.reports.tables import metric_table, render

    typer.echo(render(metric_table(result["metrics"], title)), nl=False)


def _note_unanswered(result: dict[str, Any]) -> None:
    if result["unanswered"]:
        _note(f"{len(result['unanswered'])} questions without an answer were left out")
    if result["unused_answers"]:
        _note(f"{result['unused_answers']} answers belong to no question that was scored")


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)
