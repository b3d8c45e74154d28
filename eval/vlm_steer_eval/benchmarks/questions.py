"""POPE question and answer files, joined by question id and never by line."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.choices import Missing
from vlm_steer_eval.files import image_key, read_rows

from .pope import Answer

__all__ = [
    "PopeQuestion",
    "check_answered",
    "list_some",
    "load_answers",
    "load_questions",
    "load_texts",
    "refuse_duplicates",
]

_SHOWN = 5


@dataclass(frozen=True)
class PopeQuestion:
    """One yes/no question about one image.

    Attributes:
        id: the file's question id, as text.
        image: the file's image name; empty where it is null.
        text: the question.
        label: the true answer.
        category: the split it belongs to in a merged file; empty otherwise.
        after: id of the question before it in its dialogue; empty for none.
    """

    id: str
    image: str
    text: str
    label: Answer
    category: str = ""
    after: str = ""

    @property
    def cluster(self) -> str:
        """The image as a key that id and file name share; the question where there is none."""
        return image_key(self.image) if self.image else f"question {self.id}"


def load_questions(path: Path, *, dialogues: bool = False) -> list[PopeQuestion]:
    """Questions of a POPE-format file: `question_id`, `image`, `text`, `label` per row.

    The layout of POPEv2 (`image_name`, `query`, `label`) is known too; its categories are
    `original` and `removed`, the picture without the object.

    Args:
        path: JSON lines or a JSON array.
        dialogues: whether rows may be dialogues, with lists under `text` and `label`, whose turn t
            becomes the question `CHAT_ID/t` of the category `turn t`.

    Raises:
        DataError: the file is malformed, or an id is missing or occurs twice.
    """
    questions: list[PopeQuestion] = []
    for number, row in enumerate(read_rows(path), 1):
        if isinstance(row.get("text"), list) and dialogues:
            questions += _dialogue(path, number, row)
        else:
            questions.append(_question(path, number, row))
    refuse_duplicates(path, [question.id for question in questions])
    return questions


def load_answers(path: Path) -> dict[str, str]:
    """Question id -> text of a file of answers (`question_id` and `answer` or `text` per row).

    Raises:
        DataError: the file is malformed, or an id is missing or occurs twice.
    """
    return load_texts(path, ("question_id",), ("answer", "text"))


def load_texts(path: Path, ids: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """Id -> text of a file of answers.

    Args:
        path: JSON lines or a JSON array.
        ids: keys that may hold the id, the first that is there counts.
        texts: keys that may hold the text, likewise. Rows with a `chat_id` hold one text per turn
            there.

    Raises:
        DataError: the file is malformed, or an id is missing or occurs twice.
    """
    answers: dict[str, str] = {}
    names: list[str] = []
    for number, row in enumerate(read_rows(path), 1):
        if "chat_id" in row:
            turns = _turns(path, number, row, texts)
            names += turns
            answers |= turns
            continue
        key = next((key for key in ids if key in row), ids[0])
        names.append(_required(path, number, row, key))
        text = next((row[key] for key in texts if key in row), None)
        if not isinstance(text, str):
            raise DataError(
                f"{path}, row {number}: expected the model's answer as text under "
                f"{' or '.join(repr(key) for key in texts)}, found {row!r}"
            )
        answers[names[-1]] = text
    refuse_duplicates(path, names)
    return answers


def check_answered(
    answers: Path,
    given: Container[str],
    ids: Sequence[str],
    *,
    asked: str,
    advice: str,
    id_name: str = "",
    answer: str = "answer",
    missing: Missing = "error",
) -> list[str]:
    """The questions without an answer, where they may be left out.

    Args:
        answers: the file of answers, to be named.
        given: ids that it answers.
        ids: ids of what was asked.
        asked: what was asked, in the plural.
        advice: what to do about it.
        id_name: what the ids are called, with a space behind it.
        answer: what an answer is called.
        missing: what to do; that nothing at all is answered is always an error.

    Raises:
        DataError: questions lack an answer.
    """
    unanswered = [name for name in ids if name not in given]
    if unanswered and (missing == "error" or len(unanswered) == len(ids)):
        raise DataError(
            f"{answers} has no {answer} for {len(unanswered)} of the {len(ids)} {asked} "
            f"({id_name}{list_some(unanswered)}); {advice}"
        )
    return unanswered


def refuse_duplicates(path: Path, ids: Sequence[str]) -> None:
    """Raise `DataError` where an id of a file's rows occurs more than once."""
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: {len(repeated)} questions occur more than once ({list_some(repeated)}); "
            "remove the repeated rows or number them anew"
        )


def list_some(values: Sequence[object]) -> str:
    """The first few values, and how many more there are."""
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    more = len(values) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _question(path: Path, number: int, row: Mapping[str, Any]) -> PopeQuestion:
    if "query" in row and "image_name" in row:
        row = _second_layout(row)
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
        image="" if row.get("image", "") is None else _required(path, number, row, "image"),
        text=text,
        label="yes" if label == "yes" else "no",
        category=str(row.get("category", "")),
        after=str(row.get("after", "")),
    )


def _second_layout(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of POPEv2 in the layout of POPE."""
    is_original = str(row.get("label")).strip().lower() == "yes"
    return {
        "question_id": row["image_name"],
        "image": row["image_name"],
        "text": row["query"],
        "label": row.get("label"),
        "category": "original" if is_original else "removed",
    }


def _dialogue(path: Path, number: int, row: Mapping[str, Any]) -> list[PopeQuestion]:
    """The turns of a dialogue as questions of their own."""
    labels = row.get("label")
    if not isinstance(labels, list) or len(labels) != len(row["text"]):
        raise DataError(
            f"{path}, row {number}: expected as many labels as questions, found {row!r}"
        )
    name = _required(path, number, row, "chat_id")
    return [
        _question(
            path,
            number,
            {
                "question_id": f"{name}/{turn}",
                "image": row.get("image"),
                "text": text,
                "label": label,
                "category": f"turn {turn}",
                "after": f"{name}/{turn - 1}" if turn > 1 else "",
            },
        )
        for turn, (text, label) in enumerate(zip(row["text"], labels, strict=True), 1)
    ]


def _turns(path: Path, number: int, row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """Question id -> text of the answers of one dialogue."""
    name = _required(path, number, row, "chat_id")
    turns = next((row[key] for key in keys if key in row), None)
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise DataError(
            f"{path}, row {number}: expected the answers of the dialogue as a list of texts under "
            f"{' or '.join(repr(key) for key in keys)}, found the keys {sorted(row)}"
        )
    return {f"{name}/{turn}": text for turn, text in enumerate(turns, 1)}


def _required(path: Path, number: int, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None or isinstance(value, (list, dict)) or str(value).strip() == "":
        raise DataError(
            f"{path}, row {number}: {name} is missing; rows are joined by {name}, never by line, "
            "so give every row one"
        )
    return str(value)
