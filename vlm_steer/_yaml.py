"""YAML 1.2 with line numbers.

YAML 1.2 and not 1.1, because there ``1e-1`` is a number, ``no`` is the word, ``0777`` is not octal
and a key that stands twice is an error.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML, AliasToken
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from vlm_steer.errors import ConfigError

__all__ = ["Place", "parse_yaml", "read_yaml"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written; its text is the prefix of a message about that value.

    Attributes:
        source: The file or the command-line option, empty for values made in Python.
        node: The YAML node of the value, where there is one.
        line: Line of the value, or of the key that it belongs to, counted from 1.
    """

    source: str = ""
    node: Node | None = None
    line: int | None = None

    def __getitem__(self, key: str | int) -> "Place":
        """The place of an entry of a mapping or of an item of a list."""
        if isinstance(self.node, MappingNode):
            for key_node, value_node in self.node.value:
                if key_node.value == str(key):
                    return Place(self.source, value_node, _line(key_node))
        if isinstance(self.node, SequenceNode) and isinstance(key, int):
            item = self.node.value[key]
            return Place(self.source, item, _line(item))
        return Place(self.source, None, self.line)

    def __str__(self) -> str:
        if not self.source:
            return ""
        return f"{self.source}: " if self.line is None else f"{self.source}:{self.line}: "

    def error(self, message: str) -> ConfigError:
        """A ConfigError whose message starts with this place."""
        return ConfigError(f"{self}{message}")

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Put this place in front of the message of a ConfigError raised inside the block."""
        try:
            yield
        except ConfigError as error:
            raise self.error(str(error)) from None


def read_yaml(path: str | os.PathLike[str]) -> tuple[object, Place]:
    """Read one YAML document from a file.

    Returns:
        The document as plain Python data (``None`` when the file holds nothing) and its place.

    Raises:
        ConfigError: The file cannot be read, or is not one YAML 1.2 document of plain data.
    """
    source = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}.") from None
    return parse_yaml(text, source)


def parse_yaml(text: str, source: str, *, with_lines: bool = True) -> tuple[object, Place]:
    """Parse one YAML document.

    Args:
        text: The document.
        source: What to call it in messages.
        with_lines: Whether line numbers mean anything to the reader of a message.

    Raises:
        ConfigError: The text is not one YAML 1.2 document of plain data.
    """
    yaml = YAML(typ="safe", pure=True)
    here = Place(source)
    try:
        node = yaml.compose(text)
        aliases = [token for token in yaml.scan(text) if isinstance(token, AliasToken)]
        data: object = yaml.load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        line = mark.line + 1 if mark is not None and with_lines else None
        raise Place(source, None, line).error(
            f"not valid YAML: {problem.splitlines()[0]}"
        ) from None
    except ValueError as error:  # a date or a number that has the form of one but is none
        raise here.error(f"not valid YAML: {error}") from None
    except RecursionError:
        raise here.error("not valid YAML: nested too deeply.") from None
    if aliases:  # they can be circular, and a few lines of them can stand for gigabytes
        raise Place(source, None, _line(aliases[0])).error(
            f"alias *{aliases[0].value} is not supported. Write the value out."
        )
    if node is None or not with_lines:
        return data, here
    return data, Place(source, node, _line(node))


def _line(marked: Node | AliasToken) -> int:
    line: int = marked.start_mark.line
    return line + 1
