"""What the registered methods are, as data and as the table in the README."""

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_steer._options import Option, describe
from vlm_steer.registry import get_method, list_methods

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = ["Entry", "entries", "entry", "markdown_table"]

# In the order in which data passes them, as in vlm_steer.engine.hooks.
_HOOKS = (
    "branches",
    "prepare",
    "positions",
    "embeds",
    "mask",
    "marks",
    "carry",
    "scores",
    "tally",
    "weights",
    "choose",
    "heads",
    "mlp",
    "hidden",
    "vision",
    "select_taps",
    "logits",
    "plausible",
    "observe",
    "search",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered method.

    Attributes:
        name: Its name.
        summary: First sentence of its documentation.
        paper: Link to its paper, or an empty string.
        hooks: Where it acts, in the order in which data passes.
        cost: What it costs, from its documentation.
        options: Its options.
    """

    name: str
    summary: str
    paper: str
    hooks: tuple[str, ...]
    cost: str
    options: tuple[Option, ...]


def entry(name: str) -> Entry:
    """Everything about one method.

    Raises:
        ConfigError: No method has that name.
    """
    cls = get_method(name)
    documentation = inspect.cleandoc(cls.__doc__ or "")
    return Entry(
        name=name,
        summary=documentation.partition("\n\n")[0].replace("\n", " ").rstrip("."),
        paper=_link(cls.paper),
        hooks=tuple(hook for hook in _HOOKS if _overrides(cls, hook)),
        cost=_paragraph(documentation, "Cost:"),
        options=describe(cls),
    )


def entries() -> list[Entry]:
    """Everything about all methods, by name."""
    return [entry(name) for name in list_methods()]


def markdown_table() -> str:
    """The table of methods for the README."""
    rows = ["| method | what it does | hooks | paper | cost |", "|---|---|---|---|---|"]
    for method in entries():
        paper = f"[{method.paper.rpartition('/')[2]}]({method.paper})" if method.paper else ""
        hooks = ", ".join(f"`{hook}`" for hook in method.hooks)
        cells = (f"`{method.name}`", method.summary, hooks, paper, method.cost)
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)


def _overrides(cls: "type[Method]", hook: str) -> bool:
    from vlm_steer.engine.hooks import Method

    return getattr(cls, hook) is not getattr(Method, hook)


def _paragraph(documentation: str, start: str) -> str:
    """The paragraph that starts with a word, without the word."""
    found = re.search(rf"^{start}\s*(.*?)(?:\n\n|\Z)", documentation, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()).rstrip(".").replace("``", "`") if found else ""


def _link(paper: str) -> str:
    return paper.replace("arXiv:", "https://arxiv.org/abs/")
