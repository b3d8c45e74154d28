"""Published protocols of benchmarks: prompt, suffix, tokens, decoding, images, and what to expect.

A preset is a YAML file under `configs/benchmarks/BENCHMARK/`, or one of the user's own. It fills in
options that the user did not write. Where an unsteered model is known to score within a band under
the protocol, a run of it outside the band was made in another way than published, and says so.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm_steer.errors import ConfigError

__all__ = [
    "AppliedPreset",
    "Band",
    "Preset",
    "apply_preset",
    "check_baseline",
    "list_benchmark_presets",
    "load_preset",
    "preset_remarks",
]

MEAN = "mean"
"""A band's split that stands for the mean over the splits of the run."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where an unsteered model is expected.

    Attributes:
        model: part of the model's name, in lower case.
        metric: name of the metric.
        split: the split, or `mean` over all of them.
        low: least value expected, as the metric is written in `scores.json`.
        high: largest.
        source: who measured it.
    """

    model: str
    metric: str
    split: str
    low: float
    high: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A protocol.

    Attributes:
        name: `BENCHMARK/NAME`, or the path of the user's file.
        benchmark: the benchmark.
        source: who published it.
        data: which files it is about.
        images: number of images of those; None for any.
        options: option -> value, spelled as on the command line but with underscores.
        expected: bands of unsteered models.
    """

    name: str
    benchmark: str
    source: str
    data: str
    images: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    expected: tuple[Band, ...] = ()


@dataclass(frozen=True)
class AppliedPreset:
    """A preset and where the run departs from it.

    Attributes:
        preset: the preset.
        deviations: option -> what the user wrote instead.
    """

    preset: Preset
    deviations: Mapping[str, Any]


def list_benchmark_presets() -> list[str]:
    """Names of the presets that come with the package, sorted."""
    folder = _folder()
    return sorted(
        str(path.relative_to(folder).with_suffix("").as_posix()) for path in folder.glob("*/*.yaml")
    )


def load_preset(name: str) -> Preset:
    """A preset by its name, or from a YAML file.

    Raises:
        ConfigError: there is none of that name, or the file is malformed.
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name) if own else _folder() / f"{name}.yaml"
    known = list_benchmark_presets()
    if not own and name not in known:
        from vlm_steer.registry import did_you_mean

        raise ConfigError(
            f"--preset {name!r} is unknown.{did_you_mean(name, known)} Presets: "
            f"{', '.join(known)}; or give a YAML file"
        )
    from pydantic import TypeAdapter, ValidationError

    from vlm_steer.config import read_yaml

    data, place = read_yaml(path)
    if not isinstance(data, Mapping):
        raise place.error("a preset is a mapping with benchmark, source, data, options.")
    written = {key: value for key, value in data.items() if key != "version"}
    unknown = set(written) - (set(Preset.__dataclass_fields__) - {"name"})
    if unknown:
        raise place.error(f"unknown key {sorted(unknown)[0]!r} in a preset.")
    try:
        return TypeAdapter(Preset).validate_python({"name": name, **written})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise place.error(f"{where}: {first['msg']}") from None


def apply_preset(
    name: str,
    benchmark: str,
    given: MutableMapping[str, Any],
    written: set[str],
    types: Mapping[str, Any],
) -> AppliedPreset:
    """Fill in the options that the user did not write.

    Args:
        name: see `load_preset`.
        benchmark: what the command runs.
        given: option -> value; changed in place.
        written: options that the user wrote.
        types: option -> its type.

    Raises:
        ConfigError: the preset is of another benchmark, or has an unknown option or value.
    """
    from pydantic import TypeAdapter, ValidationError

    from vlm_steer.registry import did_you_mean

    preset = load_preset(name)
    if preset.benchmark != benchmark:
        own = [known for known in list_benchmark_presets() if known.startswith(f"{benchmark}/")]
        raise ConfigError(
            f"--preset {name} is a protocol of {preset.benchmark}; run `vlm-steer eval "
            f"{preset.benchmark}`, or "
            + (f"choose one of {', '.join(own)}" if own else f"leave it out: {benchmark} has none")
        )
    deviations = {} if given.get("limit") is None else {"limit": given["limit"]}
    for option, value in preset.options.items():
        if option not in types:
            raise ConfigError(
                f"preset {name}: {option!r} is no option of eval {benchmark}."
                f"{did_you_mean(option, types)}"
            )
        try:
            checked = TypeAdapter(types[option]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"preset {name}: {option}: {error.errors()[0]['msg']}") from None
        if option not in written:
            given[option] = checked
        elif given[option] != checked:
            deviations[option] = str(given[option])
    return AppliedPreset(preset, deviations)


def check_baseline(
    applied: AppliedPreset, summary: Mapping[str, Any], model_name: str
) -> dict[str, Any]:
    """What the preset has to say about a finished run, for its `scores.json`.

    Args:
        applied: the preset.
        summary: the contents of `scores.json`.
        model_name: what the user calls the model.

    Returns:
        `name`, `source`, `data`, `deviations`, and `expected`: the bands of this model with the
        `value` measured and whether it is `inside`; empty where the run departs from the preset.
    """
    preset = applied.preset
    deviations = dict(applied.deviations)
    if preset.images is not None and summary["n_images"] != preset.images:
        deviations["images"] = summary["n_images"]
    bands = [band for band in preset.expected if band.model in model_name.lower()]
    expected = []
    for band in [] if deviations else bands:
        value = _measured(band, summary["arms"][summary["baseline"]])
        inside = None if value is None else band.low <= value <= band.high
        expected.append({**asdict(band), "value": value, "inside": inside})
    return {
        "name": preset.name,
        "source": preset.source,
        "data": preset.data,
        "deviations": deviations,
        "expected": expected,
    }


def preset_remarks(found: Mapping[str, Any]) -> list[str]:
    """What `check_baseline` found, in sentences."""
    name = found["name"]
    if found["deviations"]:
        listed = ", ".join(f"{key} {value}" for key, value in found["deviations"].items())
        return [f"departs from preset {name} ({listed}), so no band applies"]
    if not found["expected"]:
        return [f"preset {name} knows no band for this model"]
    return [_band_remark(name, entry) for entry in found["expected"]]


def _band_remark(name: str, entry: Mapping[str, Any]) -> str:
    what = f"{entry['metric']} ({entry['split']})"
    band = f"{entry['low']:g}-{entry['high']:g}, expected of {entry['model']} under preset {name}"
    if entry["value"] is None:
        return f"no {what} to hold against {band}"
    if entry["inside"]:
        return f"the baseline's {what}, {entry['value']:.3f}, lies within {band}"
    return (
        f"the baseline's {what} is {entry['value']:.3f}, outside {band} ({entry['source']}): check "
        "the files, the chat template and the parser before trusting any difference"
    )


def _measured(band: Band, splits: Mapping[str, Any]) -> float | None:
    names = [name for name in splits if name != "all"] if band.split == MEAN else [band.split]
    values = [
        splits[name]["metrics"].get(band.metric, {}).get("value")
        for name in names
        if name in splits
    ]
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _folder() -> Path:
    from vlm_steer.config import configs_folder

    return configs_folder() / "benchmarks"
