"""The list of methods: who registers, what is found, and what a wrong name is told.

A method is found because its module lies in ``vlm_steer/methods``, or because an installed package
names a module under the entry-point group ``vlm_steer.methods``. Nothing else has to be edited.
"""

import dataclasses
import difflib
import importlib
import pkgutil
import re
import threading
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from vlm_steer.errors import ConfigError

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = ["did_you_mean", "get_method", "list_methods", "register_method"]

ENTRY_POINT_GROUP = "vlm_steer.methods"
RESERVED_NAMES = frozenset({"none"})
RESERVED_OPTIONS = frozenset({"include", "method", "methods", "name", "version"})

MethodClass = TypeVar("MethodClass", bound="type[Method]")

_methods: "dict[str, type[Method]]" = {}
_discovery = threading.Lock()
_discovered = threading.Event()


def register_method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Class decorator that makes a method known under a name.

    Running the definition of the same class again (a notebook cell, ``importlib.reload``) replaces
    it; another class under a name that is taken is refused.

    Args:
        name: The paper's acronym in lower case: letters, digits and underscores.

    Returns:
        A decorator that sets the class variable ``name`` and returns the class.

    Raises:
        ConfigError: The name is malformed or taken, or the class is not a frozen dataclass that
            derives from ``vlm_steer.engine.hooks.Method``.

    Example:
        A whole method file::

            @register_method("gain")
            @dataclass(frozen=True, kw_only=True)
            class Gain(Method):
                alpha: float = 2.0

                def heads(self, outputs: Tensor, at: At) -> Tensor:
                    return self.alpha * outputs
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED_NAMES:
        raise ConfigError(
            f"{name!r} cannot name a method. Use lower-case letters, digits and underscores, "
            f"starting with a letter, and none of {', '.join(sorted(RESERVED_NAMES))}."
        )

    def decorate(cls: MethodClass) -> MethodClass:
        _check_class(name, cls)
        taken = _methods.setdefault(name, cls)
        if _identity(taken) != _identity(cls):
            raise ConfigError(
                f"{cls.__module__}.{cls.__qualname__} cannot be registered as {name!r}: that name "
                f"belongs to {taken.__module__}.{taken.__qualname__}. Choose another name."
            )
        _methods[name] = cls
        cls.name = name
        return cls

    return decorate


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    _discover()
    return sorted(_methods)


def get_method(name: str) -> "type[Method]":
    """The class of a registered method.

    Raises:
        ConfigError: No method has that name; the message suggests the nearest one.
    """
    _discover()
    try:
        return _methods[name]
    except KeyError:
        raise ConfigError(
            f"unknown method {name!r}.{did_you_mean(name, _methods)} "
            f"Methods: {', '.join(sorted(_methods)) or 'none are installed'}."
        ) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest known word, or an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def _discover() -> None:
    """Import every module that may register a method, once per process.

    Registration itself takes no lock: a thread that imports a method directly holds the import
    lock of its module, for which the discovering thread may be waiting.
    """
    if _discovered.is_set():
        return
    with _discovery:
        if _discovered.is_set():
            return
        package = importlib.import_module("vlm_steer.methods")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{package.__name__}.{module.name}")
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            try:
                entry.load()
            except (ImportError, AttributeError) as error:
                raise ConfigError(
                    f"the entry point {entry.name!r} ({entry.value}) of the group "
                    f"{ENTRY_POINT_GROUP} cannot be loaded: {error}. Repair or uninstall the "
                    "package that declares it."
                ) from error
        _discovered.set()


def _check_class(name: str, cls: "type[Method]") -> None:
    from vlm_steer.engine.hooks import Method

    where = f"{cls.__module__}.{cls.__qualname__} cannot be registered as {name!r}"
    if not issubclass(cls, Method):
        raise ConfigError(f"{where}: it does not derive from vlm_steer.engine.hooks.Method.")
    # An undecorated subclass inherits the parameters of its base, and loses its own fields.
    parameters = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise ConfigError(
            f"{where}: it is not a frozen dataclass. Put @dataclass(frozen=True, kw_only=True) "
            "between @register_method and the class."
        )
    reserved = sorted(RESERVED_OPTIONS & {field.name for field in dataclasses.fields(cls)})
    if reserved:
        raise ConfigError(f"{where}: an option cannot be called {', '.join(reserved)}.")


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
