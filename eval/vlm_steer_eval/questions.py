"""POPE question and answer files, joined by question id and never by line."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError

from .files import image_key, read_rows
from .pope import Answer

__all__ = ["PopeQuestion", "list_some", "load_answers", "load_questions"]

_SHOWN = 5


@dataclass(frozen=True)
class PopeQuestion:
    """One yes/no question about one image.

    Attributes:
        id: the file's question id, as text.
        image: the file's image name.
        text: the question.
        label: the true answer.
        category: the split it belongs to in a merged file; empty otherwise.
    """

    id: str
    image: str
    text: str
    label: Answer
    category: str = ""

    @property
    def cluster(self) -> str:
        """The image as a key that id and file name share."""
        return image_key(self.image)


def load_questions(path: Path) -> list[PopeQuestion]:
    """Questions of a POPE-format file: `question_id`, `image`, `text`, `label` per row.

    Raises:
        DataError: the file is malformed, or an id is missing or occurs twice.
    """
    questions = [_question(path, number, row) for number, row in enumerate(read_rows(path), 1)]
    _refuse_duplicates(path, [question.id for question in questions])
    return questions


def load_answers(path: Path) -> dict[str, str]:
    """Question id -> text of a file of answers (`question_id` and `answer` or `text` per row).

    Raises:
        DataError: the file is malformed, or an id is missing or occurs twice.
    """
    answers: dict[str, str] = {}
    ids: list[str] = []
    for number, row in enumerate(read_rows(path), 1):
        ids.append(_required(path, number, row, "question_id"))
        text = row.get("answer", row.get("text"))
        if not isinstance(text, str):
            raise DataError(
                f"{path}, row {number}: expected the model's answer as text under 'answer' or "
                "'text', "
                f"found the keys {sorted(row)}"
            )
        answers[ids[-1]] = text
    _refuse_duplicates(path, ids)
    return answers


def list_some(values: Sequence[object]) -> str:
    """The first few values, and how many more there are."""
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    more = len(values) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _question(path: Path, number: int, row: Mapping[str, Any]) -> PopeQuestion:
    text, label = row.get("text"), str(row.get("label")).strip().lower()
    if isinstance(text, list):
        raise DataError(
            f"{path}, row {number}: this is a multi-turn file; expected one question per row"
        )
    if not isinstance(text, str) or label not in ("yes", "no"):
        raise DataError(
            f"{path}, row {number}: expected a question under 'text' and yes or no under 'label', "
            f"found {row!r}"
        )
    return PopeQuestion(
        id=_required(path, number, row, "question_id"),
        image=_required(path, number, row, "image"),
        text=text,
        label="yes" if label == "yes" else "no",
        category=str(row.get("category", "")),
    )


def _required(path: Path, number: int, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None or isinstance(value, (list, dict)) or str(value).strip() == "":
        raise DataError(
            f"{path}, row {number}: {name} is missing; rows are joined by question_id, never by "
            "line, "
            "so give every row one"
        )
    return str(value)


def _refuse_duplicates(path: Path, ids: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: {len(repeated)} question ids occur more than once ({list_some(repeated)}); "
            "remove the repeated rows or number them anew"
        )
