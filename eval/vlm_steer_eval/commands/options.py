"""Options that the commands of the harness share."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_steer_eval.choices import (
    AmberParser,
    BeafParser,
    HallusionParser,
    Missing,
    MmeParser,
    MmhalReading,
    MmvpParser,
    NormaliserName,
    OpopeReader,
    ParserName,
    ScenesName,
)

__all__ = [
    "AmberParserOption",
    "AmberSimilarity",
    "BeafParserOption",
    "Beams",
    "BuiltFrom",
    "BuiltSplits",
    "CaptionPrompt",
    "Columns",
    "Controls",
    "Dataset",
    "DatasetSplit",
    "Deterministic",
    "EmbeddedScenes",
    "HallusionJudge",
    "HallusionParserOption",
    "ImageFolder",
    "ImageList",
    "Images",
    "ImagesOnly",
    "Lemmas",
    "Methods",
    "MmeParserOption",
    "MmvpParserOption",
    "NormaliserOption",
    "OpopeReaderOption",
    "OutputFolder",
    "ParserOption",
    "PresetName",
    "QuestionFiles",
    "RatingOption",
    "Repeat",
    "Resamples",
    "Rescore",
    "RunOutput",
    "SharePrefix",
    "SkipBadImages",
    "Streaming",
    "Suffix",
    "Synonyms",
    "TaskImages",
    "Temperature",
    "Tokens",
    "TopP",
    "TrivialBaselines",
    "Unanswered",
    "refuse_run",
]


def _refuse_address(output: Path) -> Path:
    from vlm_steer.errors import ConfigError
    from vlm_steer_eval.running.parts import remote_url

    url = remote_url(output)
    if url is not None:
        raise ConfigError(f"--output {url}: these results go to a folder; give one, and copy it")
    return output


def refuse_run(output: Path, name: str) -> None:
    """Raise `ConfigError` where a folder holds what a run has left behind, known by a file."""
    from vlm_steer.errors import ConfigError

    if (output / name).is_file():
        raise ConfigError(
            f"--output {output} holds the results of a run, which would be replaced; give another "
            "folder"
        )


OutputFolder = Annotated[
    Path, typer.Option("--output", help="Folder for the results.", callback=_refuse_address)
]
RunOutput = Annotated[
    Path,
    typer.Option("--output", help="Folder for the results, or an address such as s3://bucket/run."),
]
Methods = Annotated[
    str,
    typer.Option("--methods", help="Arms: a comma separates them, + composes. none is always run."),
]
Controls = Annotated[
    bool,
    typer.Option(
        "--controls", help="Run the sham, or the plausibility mask alone, beside each method."
    ),
]
TrivialBaselines = Annotated[
    bool,
    typer.Option(
        "--trivial",
        help="Run baselines of the frontier too: temperatures, beams, a minimum length, biases "
        "towards and against the end.",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Answer one at a time with deterministic kernels, so that no near-tie is decided by "
        "padding or batching.",
    ),
]
Images = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Only N images, chosen by a seeded hash of their names."),
]
Tokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=1, help="Longest answer, in tokens.", rich_help_panel="Model"
    ),
]
Beams = Annotated[int, typer.Option("--num-beams", min=1, help="Width of beam search.")]
Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0.0, help="Above 0: sample, seeded per item."),
]
TopP = Annotated[float, typer.Option("--top-p", help="Nucleus of sampling, in (0, 1].")]
Resamples = Annotated[
    int, typer.Option("--resamples", min=1, help="Resamples of the intervals and tests.")
]
ParserOption = Annotated[ParserName, typer.Option("--parser", help="How answers are read.")]
NormaliserOption = Annotated[
    NormaliserName, typer.Option("--normaliser", help="How captions are read.")
]
AmberParserOption = Annotated[
    AmberParser,
    typer.Option("--parser", help="How yes/no answers are read; official: exactly Yes or No."),
]
AmberSimilarity = Annotated[
    str,
    typer.Option("--similarity", help="Of words: exact, or spacy:en_core_web_lg as in the paper."),
]
BeafParserOption = Annotated[BeafParser, typer.Option("--parser", help="How answers are read.")]
HallusionJudge = Annotated[
    str | None,
    typer.Option(
        "--judge", help="recorded:FILE, hf:MODEL or endpoint:MODEL@URL instead of the parser."
    ),
]
ImagesOnly = Annotated[
    bool, typer.Option("--images-only", help="Leave out questions without a picture.")
]
HallusionParserOption = Annotated[
    HallusionParser, typer.Option("--parser", help="How answers are read.")
]
MmeParserOption = Annotated[MmeParser, typer.Option("--parser", help="How answers are read.")]
MmvpParserOption = Annotated[MmvpParser, typer.Option("--parser", help="How answers are read.")]
OpopeReaderOption = Annotated[
    OpopeReader,
    typer.Option("--reader", help="table: as CHAIR reads; halc: any word, anywhere."),
]
SharePrefix = Annotated[
    bool, typer.Option(help="Compute each image once for its questions, where methods allow it.")
]
TaskImages = Annotated[Path, typer.Option("--images", help="Folder of the images.")]
RatingOption = Annotated[MmhalReading, typer.Option("--reading", help="How ratings are read.")]
Synonyms = Annotated[
    Path | None,
    typer.Option("--synonyms", help="CHAIR synonyms file: name, synonym, ... per line."),
]
Lemmas = Annotated[
    Path | None,
    typer.Option(
        "--lemmas", help="For opera: lines of word, tab, lemma, instead of nltk's lemmatiser."
    ),
]
EmbeddedScenes = Annotated[
    ScenesName, typer.Option("--scenes", help="Embedded scenes, where no other data is given.")
]
ImageFolder = Annotated[Path | None, typer.Option("--images", help="Folder of the images.")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Hub id, or folder, of a data set instead.")
]
Columns = Annotated[
    str | None, typer.Option("--columns", help="Columns of --dataset: role=column,role=column.")
]
DatasetSplit = Annotated[str, typer.Option("--dataset-split", help="Split of --dataset.")]
Streaming = Annotated[
    bool,
    typer.Option(
        "--streaming",
        help="Read --dataset row by row, without storing it, up to the first --limit images.",
    ),
]
ImageList = Annotated[
    Path | None,
    typer.Option("--image-list", help="Only the images of a file, one id or file name per row."),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="A published protocol, or your own YAML; `vlm-steer eval presets` lists them. "
        "Options that you write win.",
    ),
]
BuiltSplits = Annotated[
    str, typer.Option("--splits", help="Splits to build: random,popular,adversarial.")
]
CaptionPrompt = Annotated[str, typer.Option("--prompt", help="What the model is asked.")]
QuestionFiles = Annotated[
    list[Path] | None,
    typer.Option("--questions", help="POPE question file; needs --images. Repeatable."),
]
BuiltFrom = Annotated[
    Path | None,
    typer.Option("--annotations", help="COCO instances file to build questions from."),
]
Suffix = Annotated[
    str, typer.Option("--suffix", help="Appended to every question of your own data.")
]
Unanswered = Annotated[Missing, typer.Option("--missing", help="Questions without an answer.")]
Repeat = Annotated[
    str | None,
    typer.Option(
        "--repeat",
        help="Answer again with these batch sizes, such as 1,4, and count what changes.",
    ),
]
Rescore = Annotated[
    Path | None,
    typer.Option(
        "--rescore",
        metavar="RUN",
        help="Score the answers that a run has logged, by other rules or labels, without a model.",
    ),
]
SkipBadImages = Annotated[
    bool,
    typer.Option("--skip-bad-images", help="Exit 0 although images had to be left out."),
]
