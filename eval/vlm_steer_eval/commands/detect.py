"""Commands that fit, use and judge detectors of hallucinated words."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from vlm_steer.commands.groups import Loading, spelled_out
from vlm_steer.commands.options import (
    BatchSize,
    ModelName,
    Seed,
)
from vlm_steer.errors import ConfigError

from .options import EmbeddedScenes, ImageFolder, Images, OutputFolder, Resamples, Tokens
from .origins import chair_task
from .run import refuse_several_sources, required_folder

if TYPE_CHECKING:
    from vlm_steer_eval.detection.labels import Labelled

__all__ = ["register"]

CalibratorOption: TypeAlias = Annotated[
    Literal["platt", "temperature", "isotonic"],
    typer.Option("--calibrator", help="From log-odds to probabilities."),
]
ClassifierOption: TypeAlias = Annotated[
    Literal["logistic", "mlp"],
    typer.Option(
        "--classifier", help="Logistic regression, or the network of one hidden layer of SVAR."
    ),
]
PositionOption: TypeAlias = Annotated[
    Literal["none", "residualize", "ipw"],
    typer.Option(
        "--position",
        help="Keep the place of words out of the weights: take what it tells off each feature "
        "(residualize), or weigh units to equal class shares at every place (ipw).",
    ),
]
BaseRate: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--base-rate",
        help="Share of hallucinated units to expect here, in (0, 1): corrects probabilities that "
        "were fitted where it was another.",
    ),
]
PresetOption: TypeAlias = Annotated[
    Literal["default", "paper"],
    typer.Option(
        "--preset",
        help="How weights are fitted: default (standardised, balanced, strength by "
        "cross-validation over images) or paper (neither scaled nor balanced, strength 1).",
    ),
]
MentionsOption: TypeAlias = Annotated[
    Literal["first", "all", "text"],
    typer.Option(
        "--mentions", help="Judge the first mention of each object, all, or texts as a whole."
    ),
]
OptionsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of a detector, such as svar.heads=each. Repeatable."),
]
Annotations: TypeAlias = Annotated[
    Path | None, typer.Option("--annotations", help="COCO annotations folder or instances file.")
]
Objects: TypeAlias = Annotated[
    Path | None, typer.Option("--objects", help="Object sets per image, JSON or .gz.")
]
Questions: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option("--questions", help="POPE question file: judge yes and no. Repeatable."),
]
Texts: TypeAlias = Annotated[
    Path | None,
    typer.Option("--texts", help="Labelled texts: JSON lines of image, text and spans."),
]
Prompt: TypeAlias = Annotated[str, typer.Option("--prompt", help="What the model is asked.")]
Method: TypeAlias = Annotated[
    str, typer.Option("--method", help="Steer while generating, and judge the steered model.")
]

_PROMPT = "Please describe this image in detail."
_IN_WORDS = {
    "maps": "maps of attention",
    "received": "one more pass over the text",
    "lens": "the output head on all image tokens",
    "blind": "one more pass, without the image",
}


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """What detectors are fitted or judged on; the annotation of a field is its option."""

    scenes: EmbeddedScenes = "validation"
    annotations: Annotations = None
    objects: Objects = None
    questions: Questions = None
    texts: Texts = None
    images: ImageFolder = None
    prompt: Prompt = _PROMPT
    mentions: MentionsOption = "first"
    limit: Images = None
    seed: Seed = 0

    def labelled(self) -> "Labelled":
        """The labelled data that the options name.

        Raises:
            ConfigError: they contradict each other.
            DataError: a file cannot be used.
        """
        from vlm_steer_eval.detection.labels import caption_labels, labelled_texts, pope_labels
        from vlm_steer_eval.running.sources import local_pope

        refuse_several_sources(
            truth=self.annotations or self.objects, questions=self.questions, texts=self.texts
        )
        if self.texts is not None:
            if self.limit is not None:
                raise ConfigError("--limit has no effect on --texts; shorten the file")
            return labelled_texts(self.texts, required_folder(self.images, "--texts"), self.prompt)
        if self.questions:
            folder = required_folder(self.images, "--questions")
            return pope_labels(local_pope(self.questions, folder, limit=self.limit, seed=self.seed))
        task = chair_task(
            scenes=self.scenes,
            annotations=self.annotations,
            objects=self.objects,
            images=self.images,
            limit=self.limit,
            seed=self.seed,
            prompt=self.prompt,
        )
        return caption_labels(task, mentions=self.mentions)


def register(app: typer.Typer) -> None:
    """Add ``detect`` to the application."""
    group = typer.Typer(
        help="Find the words of a text that the image does not support.", no_args_is_help=True
    )
    group.command("list", epilog="Example: vlm-steer detect list")(show)
    group.command(
        epilog="Example: vlm-steer detect fit lookback_ratio --model tiny --output detector"
    )(fit)
    group.command(
        "eval",
        epilog="Example: vlm-steer detect eval detector position entropy --model tiny "
        "--scenes broken --output out",
    )(evaluate)
    group.command(epilog="Example: vlm-steer detect score detector --model tiny --image photo.jpg")(
        score
    )
    group.command(
        epilog="Example: vlm-steer detect convert classifier_anno-nq-7b_sliding_window_8.pkl "
        "--layers 32 --heads 32 --output detector"
    )(convert)
    group.command(epilog="Example: vlm-steer detect push detector me/svar-llava --private")(push)
    app.add_typer(group, name="detect")


def show(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a list.")] = False,
) -> None:
    """List the detectors, their options and what they need."""
    from vlm_steer.detection import build_detector, get_detector, list_detectors

    entries: list[dict[str, Any]] = []
    for name in list_detectors():
        cls = get_detector(name)
        entries.append(
            {
                "name": name,
                "summary": (cls.__doc__ or "").strip().splitlines()[0],
                "paper": cls.paper,
                "needs": list(cls.needs),
                "needs_evidence": cls.needs_evidence,
                "must_be_fitted": cls.must_be_fitted,
                "options": build_detector(name).options(),
            }
        )
    if as_json:
        typer.echo(json.dumps(entries, indent=2, default=str))
        return
    for entry in entries:
        typer.echo(f"{entry['name']}: {entry['summary']}")
        given = ", ".join(f"{key}={value}" for key, value in entry["options"].items())
        if given:
            typer.echo(f"    {given}")
        if needed := _needed(entry):
            typer.echo(f"    needs {', '.join(needed)}")


def _needed(entry: Mapping[str, Any]) -> list[str]:
    """What a detector takes beside the trace of a generation, in words."""
    return [
        *(["fitting"] if entry["must_be_fitted"] else []),
        *(_IN_WORDS[need] for need in entry["needs"]),
        *(["the image, or a model to ask again"] if entry["needs_evidence"] else []),
    ]


@spelled_out()
def fit(
    data: LabelledData,
    loading: Loading,
    detectors: Annotated[list[str], typer.Argument(help="Detectors to fit, by name.")],
    output: OutputFolder,
    model: ModelName = "tiny",
    options: OptionsOption = None,
    method: Method = "none",
    preset: PresetOption = "default",
    classifier: ClassifierOption = "logistic",
    position: PositionOption = "none",
    calibrator: CalibratorOption = "platt",
    max_new_tokens: Tokens = 512,
    resamples: Resamples = 1000,
    batch_size: BatchSize = 8,
) -> None:
    """Fit detectors on texts of a model, calibrate them, and judge them on images left out."""
    from vlm_steer_eval.detection.command import fit_and_judge, parse_detectors
    from vlm_steer_eval.detection.data import Settings
    from vlm_steer_eval.detection.run import Recipe

    table, folders = fit_and_judge(
        parse_detectors(detectors, options or []),
        data.labelled(),
        model,
        loading.loading(),
        output,
        Recipe(preset, classifier, position, calibrator, data.seed),
        settings=Settings(max_new_tokens, method, batch_size),
        resamples=resamples,
    )
    typer.echo(table, nl=False)
    for folder in folders:
        typer.echo(f"detector: {folder}")


@spelled_out(scenes="broken")
def evaluate(
    data: LabelledData,
    loading: Loading,
    detectors: Annotated[
        list[str],
        typer.Argument(
            help="Folders of fitted detectors or their names on the hub, or names of detectors "
            "without weights."
        ),
    ],
    output: OutputFolder,
    model: ModelName = "tiny",
    options: OptionsOption = None,
    base_rate: BaseRate = None,
    method: Method = "none",
    max_new_tokens: Tokens = 512,
    resamples: Resamples = 1000,
    batch_size: BatchSize = 8,
) -> None:
    """Judge detectors on images that they were not fitted on, beside the controls."""
    from vlm_steer_eval.detection.command import judge
    from vlm_steer_eval.detection.data import Settings

    table = judge(
        detectors,
        options or [],
        data.labelled(),
        model,
        loading.loading(),
        output,
        run=Settings(max_new_tokens, method, batch_size),
        base_rate=base_rate,
        resamples=resamples,
        seed=data.seed,
    )
    typer.echo(table, nl=False)
    typer.echo(f"results: {output}")


@spelled_out()
def score(
    loading: Loading,
    detector: Annotated[
        str,
        typer.Argument(
            help="Folder of a fitted detector or its name on the hub, or the name of another."
        ),
    ],
    image: Annotated[list[Path], typer.Option("--image", help="An image file. Repeatable.")],
    model: ModelName = "tiny",
    prompt: Prompt = _PROMPT,
    text: Annotated[
        str | None, typer.Option("--text", help="Judge this text instead of generating one.")
    ] = None,
    options: OptionsOption = None,
    base_rate: BaseRate = None,
    method: Method = "none",
    every_token: Annotated[
        bool, typer.Option("--every-token", help="Judge every token, not only COCO objects.")
    ] = False,
    max_new_tokens: Tokens = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Rate the words of a text about an image, generated or given."""
    from vlm_steer_eval.detection.command import rate

    rows = rate(
        detector,
        options or [],
        image,
        prompt,
        model,
        loading.loading(),
        text=text,
        method=method,
        every_token=every_token,
        max_new_tokens=max_new_tokens,
        base_rate=base_rate,
    )
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        typer.echo(f"{row['image']}: {row['text']}")
        if not row["units"]:
            typer.echo("  names no object of COCO; --every-token rates every token")
        for unit in row["units"]:
            flag = "  <- flagged" if unit["flagged"] else ""
            typer.echo(f"  {unit['risk']:8.3f}  {unit['text']}{flag}")


def convert(
    pickle: Annotated[Path, typer.Argument(help="A published Lookback Lens classifier, .pkl.")],
    output: OutputFolder,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers of its model.")] = 32,
    heads: Annotated[int, typer.Option(min=1, help="Heads per layer of its model.")] = 32,
) -> None:
    """Turn a published Lookback Lens pickle into a detector, executing nothing in it."""
    from vlm_steer.detection.pickles import convert_lookback

    fitted = convert_lookback(pickle, layers=layers, heads=heads)
    fitted.save_pretrained(output)
    typer.echo(f"{output}: {layers * heads} weights of {pickle.name}")


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a fitted detector.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who may read a repository that is made."),
    ] = None,
    message: Annotated[
        str, typer.Option("--message", help="Message of the commit.")
    ] = "Add detector",
) -> None:
    """Put a fitted detector on the Hugging Face hub, with the names of the images it was fitted on.

    `score`, `eval` and `explain` take OWNER/NAME where they take the folder of a detector.
    """
    from vlm_steer.detection import FittedDetector

    fitted = FittedDetector.from_pretrained(folder)
    typer.echo(fitted.push_to_hub(repo, private=private, message=message))
