"""From what a user writes to methods, and back.

Every way to say what to steer ends in a tuple of methods, in order of application:

===============================================  ===============================================
written                                          means
===============================================  ===============================================
``None``, ``"none"``                             nothing
``"var"``, ``"var_official"``                    a method with its defaults; a preset
``"var+vcd"``, ``["var", "vcd"]``                both, in this order
``{"method": "pai", "alpha": 0.5}``              one method with options
``{"methods": [...]}``, ``"mine.yaml"``, a path  a list of methods with options
``PAI(alpha=0.5)``                               itself
===============================================  ===============================================
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vlm_steer._options import Option, build, describe, option_names, plain
from vlm_steer._overrides import apply_overrides
from vlm_steer._yaml import Place, read_yaml
from vlm_steer.errors import ConfigError
from vlm_steer.registry import did_you_mean, get_method, list_methods

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = [
    "Option",
    "Spec",
    "apply_overrides",
    "configs_folder",
    "describe",
    "dump",
    "find_preset",
    "list_presets",
    "read_yaml",
    "resolve",
    "resolve_data",
]

VERSION = 1
SUFFIXES = (".yaml", ".yml", ".json")
OFF = "none"

Spec: TypeAlias = "str | os.PathLike[str] | Mapping[str, object] | Method | Sequence[Spec] | None"


def resolve(spec: Spec) -> "tuple[Method, ...]":
    """The methods that a specification stands for, in order of application.

    Args:
        spec: Any of the forms in the module docstring. A list may mix them.

    Returns:
        Frozen methods; empty when nothing is to be steered.

    Raises:
        ConfigError: A name, an option or a file is wrong. For files the message starts with
            ``file:line:``.

    Example:
        >>> resolve(None), resolve("none")
        ((), ())
    """
    from vlm_steer.engine.hooks import Method

    if spec is None:
        return ()
    if isinstance(spec, Method):
        return (spec,)
    if isinstance(spec, str):
        return _from_text(spec)
    if isinstance(spec, os.PathLike):
        return _from_file(Path(spec))
    if isinstance(spec, Mapping):
        return _from_mapping(spec, Place(), folder=None)
    if isinstance(spec, Sequence):
        return tuple(method for part in spec for method in resolve(part))
    raise ConfigError(
        f"a {type(spec).__name__} does not say what to steer. Give a name such as 'var', names "
        "joined by '+', a mapping, a YAML path, a method, a list of these, or None."
    )


def resolve_data(data: object, place: Place) -> "tuple[Method, ...]":
    """The methods that the contents of a file stand for, ``include`` excepted.

    Args:
        data: The contents as plain data.
        place: Where they were written, for messages.

    Raises:
        ConfigError: A name or an option is wrong.
    """
    return _from_mapping(data, place, folder=None)


def dump(methods: "Sequence[Method]") -> dict[str, Any]:
    """Methods as plain data that JSON and YAML can hold; ``resolve`` reads it back unchanged.

    Every option is written out, except those that have no effect under the others.

    Raises:
        ConfigError: An option holds something that cannot be written to a file.
    """
    return {"version": VERSION, "methods": [_dump_one(method) for method in methods]}


def list_presets() -> list[str]:
    """Names of the configurations that come with the package, sorted."""
    return sorted(path.stem for path in configs_folder().glob("*.yaml"))


def find_preset(name: str) -> Path:
    """The file of a configuration that comes with the package.

    Raises:
        ConfigError: There is none of that name.
    """
    path = configs_folder() / f"{name}.yaml"
    if not path.is_file():
        known = list_presets()
        raise ConfigError(
            f"unknown preset {name!r}.{did_you_mean(name, known)} Presets: {', '.join(known)}."
        )
    return path


def configs_folder() -> Path:
    """Where the configurations lie: in an installed package, or ``configs`` of a checkout."""
    package = Path(__file__).parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def _from_text(text: str) -> "tuple[Method, ...]":
    if text.endswith(SUFFIXES) and ("+" not in text or Path(text).is_file()):
        return _from_file(Path(text))
    parts = [part.strip() for part in text.split("+")]
    return tuple(method for part in parts for method in _from_word(part, text))


def _from_word(word: str, whole: str) -> "tuple[Method, ...]":
    if word == OFF:
        return ()
    if word.endswith(SUFFIXES):
        return _from_file(Path(word))
    if not word:
        raise ConfigError(f"{whole!r} names no method. Write for example 'var' or 'var+vcd'.")
    if "," in word:
        raise ConfigError(f"{whole!r} is a list of arms. Join methods that act together with '+'.")
    methods, presets = list_methods(), list_presets()
    if word in methods:
        return (build(get_method(word), {}, Place()),)
    if word in presets:
        return _from_file(find_preset(word))
    known = sorted({*methods, *presets})
    raise ConfigError(
        f"unknown method or preset {word!r}.{did_you_mean(word, known)} Known: {', '.join(known)}."
    )


def _from_file(path: Path) -> "tuple[Method, ...]":
    if not path.exists() and path.parent == Path() and path.stem in list_presets():
        path = find_preset(path.stem)
    data, place = read_yaml(path)
    return _from_mapping(data, place, folder=path.parent)


def _from_mapping(data: object, place: Place, *, folder: Path | None) -> "tuple[Method, ...]":
    """Read a whole configuration; ``folder`` is what ``include`` is relative to."""
    if data is None:
        raise place.error("is empty. Write methods: and a list of methods.")
    top = _as_mapping(data, place, "a configuration is a mapping with methods:")
    _check_version(top, place)
    if "method" in top:
        return (_from_entry({k: v for k, v in top.items() if k != "version"}, place),)
    for key in top:
        if key not in ("version", "include", "methods"):
            known = ("methods", "method", "include", "version")
            raise place[key].error(
                f"unknown key {key!r}.{did_you_mean(str(key), known)} "
                "A configuration has version, include and methods; options go under a method."
            )
    if "methods" not in top and "include" not in top:
        raise place.error("the key methods is missing. Write methods: and a list of methods.")
    included = _from_includes(top["include"], place["include"], folder) if "include" in top else ()
    entries = _as_list(top.get("methods", []), place["methods"], "methods")
    listed = [_from_entry(entry, place["methods"][i]) for i, entry in enumerate(entries)]
    return (*included, *listed)


def _from_includes(value: object, place: Place, folder: Path | None) -> "tuple[Method, ...]":
    if folder is None:
        raise place.error("include works in files only. List the methods instead.")
    methods: list[Method] = []
    for i, name in enumerate(_as_list(value, place, "include")):
        here = place[i]
        if not isinstance(name, str):
            raise here.error(f"include lists file names, not {_kind(name)}.")
        if not (folder / name).is_file():
            raise here.error(f"{folder / name} does not exist. Paths are relative to this file.")
        data, inner = read_yaml(folder / name)
        if isinstance(data, Mapping) and "include" in data:
            raise inner["include"].error(
                f"an included file cannot include others. List them in {place.source}."
            )
        methods += _from_mapping(data, inner, folder=None)
    return tuple(methods)


def _from_entry(entry: object, place: Place) -> "Method":
    """Read one item of ``methods``."""
    from vlm_steer.engine.hooks import Method

    if isinstance(entry, Method):
        return entry
    if isinstance(entry, str):
        entry = {"method": entry}
    options = dict(_as_mapping(entry, place, "a method is a name, or a mapping with method:"))
    if "method" not in options:
        raise place.error("the key method is missing. Write method: and a name.")
    name = options.pop("method")
    if not isinstance(name, str):
        raise place["method"].error(f"method must be a name, not {_kind(name)}.")
    with place["method"].blamed():
        cls = get_method(name)
    return build(cls, options, place)


def _check_version(top: Mapping[str, object], place: Place) -> None:
    version = top.get("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise place["version"].error(
            f"version {_kind(version)} is not known. This vlm_steer reads version: {VERSION}."
        )


def _as_mapping(value: object, place: Place, expected: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise place.error(f"{expected}, not {_kind(value)}.")
    for key in value:
        if not isinstance(key, str):
            raise place[key].error(f"the key {key!r} must be text.")
    return value


def _as_list(value: object, place: Place, key: str) -> Sequence[object]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise place.error(f"{key} must be a list, not {_kind(value)}.")
    return value


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    return json.dumps(value, default=str)


def _dump_one(method: "Method") -> dict[str, Any]:
    skipped = method.ignored_options()
    options = {
        name: plain(getattr(method, name), name)
        for name in option_names(type(method))
        if name not in skipped
    }
    return {"method": method.name, **options}
