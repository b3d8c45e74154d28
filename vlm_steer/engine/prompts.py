"""Prompts of branches that hold text the user's does not: token ids in, arguments of a forward out.

An insertion is made in the arguments of the user's own first forward, so that images are not
encoded again and no model family is special: whatever has one entry per token gets more of them,
and positions move up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vlm_steer.engine.hooks import Branch, Columns, Insertion
from vlm_steer.engine.inputs import is_per_token
from vlm_steer.engine.model import ModelInfo
from vlm_steer.errors import ConfigError, UnsupportedModelError

__all__ = [
    "Edit",
    "edit_of",
    "first_ids",
    "questions_in",
    "with_ids",
    "with_image_instruction",
    "with_insertion",
]

_MARKER = "\N{BLACK SQUARE}question\N{BLACK SQUARE}"


# -- at attach --------------------------------------------------------------------------------
def with_ids(branch: Branch, method: str, model: ModelInfo, processor: Any) -> Branch:
    """The branch with its text as token ids.

    Raises:
        ConfigError: Ids are needed, and there is neither a processor nor ids; or they are not
            ids of text in this model.
    """
    insertion = branch.insert
    if insertion is None:
        return branch
    to_vision = insertion.to_vision and model.has_image_instruction
    ids = insertion.text
    if isinstance(ids, str):
        ids = _encode(ids, method, _tokenizer(processor, to_vision=to_vision))
    images = () if to_vision else model.image_token_ids
    wrong = [i for i in ids if i < 0 or i in images]
    if not ids or wrong:
        raise ConfigError(
            f"{method}: the text that its branch adds has token ids {list(ids)}; there must be "
            "some, none of them negative or standing for an image."
        )
    tail = insertion.tail
    if tail is None:
        is_before_tail = insertion.where in ("question", "end")
        tail = _measured_tail(method, processor) if is_before_tail else 0
    tokenizer = _tokenizer(processor, to_vision=False)
    markers = {*model.special_token_ids, *getattr(tokenizer, "all_special_ids", ())}
    insertion = replace(insertion, text=ids, tail=tail, markers=tuple(sorted(markers)))
    return replace(branch, insert=insertion)


def first_ids(
    groups: Mapping[str, tuple[str, ...] | tuple[int, ...]], method: str, processor: Any
) -> dict[str, tuple[int, ...]]:
    """Token ids with which the words of each group begin, in no other group.

    Raises:
        ConfigError: There are words and no processor, or a group has no token of its own.
    """
    begins: dict[str, set[int]] = {}
    tokenizer = _tokenizer(processor, to_vision=False)
    for name, words in groups.items():
        if tokenizer is None and any(isinstance(word, str) for word in words):
            raise ConfigError(
                f"{method} looks for the first tokens of {', '.join(map(str, words))}. Pass "
                f"processor=... to steer() or attach(), or give the ids themselves ({name}_ids)."
            )
        forms = [f for word in words if isinstance(word, str) for f in (word, f" {word}")]
        found = {_encode(form, method, tokenizer)[0] for form in forms}
        begins[name] = found | {word for word in words if isinstance(word, int)}
    own = {
        name: ids - set().union(*(other for key, other in begins.items() if key != name))
        for name, ids in begins.items()
    }
    for name, ids in own.items():
        if not ids:
            raise ConfigError(
                f"{method}: the words for {name} ({', '.join(map(str, groups[name]))}) begin with "
                "no token of their own. Use other words, or give token ids."
            )
    return {name: tuple(sorted(ids)) for name, ids in own.items()}


def _tokenizer(processor: Any, *, to_vision: bool) -> Any:
    name = "qformer_tokenizer" if to_vision else "tokenizer"
    return getattr(processor, name, processor if callable(processor) else None)


def _encode(text: str, method: str, tokenizer: Any) -> tuple[int, ...]:
    if tokenizer is None:
        raise ConfigError(
            f"{method} adds text to the prompt of its branch and needs token ids for it. Pass "
            "processor=... to steer() or attach(), or give the ids themselves."
        )
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _measured_tail(method: str, processor: Any) -> int:
    """How many tokens a chat template puts behind the user's text."""
    if getattr(processor, "chat_template", None) is None:
        raise ConfigError(
            f"{method} adds text behind the question, and cannot tell where in the prompt the "
            "question ends. Pass a processor with a chat template, or set tail to the number of "
            "prompt tokens behind the question (those of ' ASSISTANT:', for example)."
        )
    content = [{"type": "text", "text": _MARKER}]
    whole = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    behind = whole.rpartition(_MARKER)[2]
    return len(_encode(behind, method, _tokenizer(processor, to_vision=False))) if behind else 0


# -- while generating -------------------------------------------------------------------------
def questions_in(ids: Tensor | None, columns: Columns, processor: Any) -> tuple[str, ...]:
    """The text behind the last image of every row, without what a chat template puts behind it.

    Args:
        ids: ``[batch, prompt]`` token ids.
        columns: What the tokens of the prompt are.
        processor: The model's.

    Raises:
        UnsupportedModelError: Only embeddings of the prompt are known.
    """
    if ids is None:
        raise UnsupportedModelError(
            "a method reads the question and needs its token ids. Pass input_ids."
        )
    has_template = getattr(processor, "chat_template", None) is not None
    tail = _measured_tail("", processor) if has_template else 0
    tokenizer = _tokenizer(processor, to_vision=False)
    kinds, questions = columns.kinds.to(ids.device), []
    for row, kind in zip(ids, kinds, strict=True):
        is_image = (kind == Columns.IMAGE).nonzero().flatten()
        start = int(is_image[-1]) + 1 if len(is_image) else 0
        is_question = kind[start:] >= Columns.SYSTEM
        question = row[start:][is_question].tolist()
        question = question[: len(question) - tail]
        questions.append(tokenizer.decode(question, skip_special_tokens=True).strip())
    return tuple(questions)


# -- where and what ---------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Edit:
    """Which token of an edited prompt comes from where.

    Attributes:
        ids: ``[batch, inserted]`` the inserted ids; -1 for none, in front of the others.
        order: ``[batch, new]`` indices into the old tokens followed by the inserted ones.
        place: ``[batch, 1]`` old index before which the text stands; the old length for the end.
        neighbour: ``[batch, 1]`` old text token whose properties the inserted ones take.
        shift: ``[batch, old + 1]`` how far the positions of old tokens, and of the end, move.
        kinds: ``[batch, new]`` codes of ``Columns``.
    """

    ids: Tensor
    order: Tensor
    place: Tensor
    neighbour: Tensor
    shift: Tensor
    kinds: Tensor

    @property
    def is_token(self) -> Tensor:
        """``[batch, new]`` bool, ``False`` for padding."""
        return self.kinds != Columns.PADDING

    def of_tokens(self, value: Tensor) -> Tensor:
        """``[batch, new, ...]`` from one entry per old token, ``[batch, old, ...]``."""
        return self.with_new(
            value, _gather(value, self.neighbour).expand(-1, self.ids.shape[1], *value.shape[2:])
        )

    def with_new(self, value: Tensor, new: Tensor) -> Tensor:
        """The same with ``[batch, inserted, ...]`` entries for the inserted tokens."""
        return _gather(torch.cat([value, new], dim=1), self.order)

    def of_positions(self, positions: Tensor) -> Tensor:
        """``[..., batch, new]`` from position ids ``[..., batch or 1, old]``."""
        lead = (*positions.shape[:-2], self.order.shape[0])
        end = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        moved = end.expand(*lead, end.shape[-1]) + self.shift.to(positions.dtype)
        n_inserted = self.ids.shape[1]
        count = torch.arange(n_inserted, device=positions.device)
        first = moved.gather(-1, self.place.expand(*lead, 1)) - n_inserted
        both = torch.cat([moved[..., :-1], first + count], dim=-1)
        ordered = both.gather(-1, self.order.expand(*lead, self.order.shape[-1]))
        return ordered.masked_fill(~self.is_token, 0)


def edit_of(
    insertion: Insertion,
    kinds: Tensor,
    input_ids: Tensor | None = None,
    begin: Sequence[int] = (),
    more: Tensor | None = None,
) -> Edit:
    """Find the place of an insertion in every row.

    Args:
        insertion: What to insert, as ids.
        kinds: ``[batch, prompt]`` codes of ``Columns``.
        input_ids: ``[batch, prompt]``; without them every token counts as plain text.
        begin: Ids with which a prompt may begin and that stay in front.
        more: ``[batch, tokens]`` ids to put behind the insertion's, -1 for none.
    """
    rows, length = kinds.shape
    index = torch.arange(length, device=kinds.device).expand(rows, length)
    is_token, is_image = kinds != Columns.PADDING, kinds == Columns.IMAGE
    first = is_token.int().argmax(dim=1, keepdim=True)
    start = first + _is_in(input_ids, begin, kinds).gather(1, first)
    last = torch.where(is_token, index, -1).amax(dim=1, keepdim=True)
    is_special = _is_in(input_ids, insertion.markers, kinds)
    is_removed = torch.zeros_like(is_image)
    if insertion.where == "end":
        place = last + 1 - (insertion.tail or 0)
    elif insertion.where in ("instruction", "question"):
        image_end = torch.where(is_image, index, -1).amax(dim=1, keepdim=True)
        is_open = (index > image_end) & (index >= start) & ~is_special
        place = torch.where(is_open, index, last).amin(dim=1, keepdim=True)
    else:
        place = start
    if insertion.where == "system":
        image_start = torch.where(is_image, index, -1).amax(dim=1, keepdim=True)
        image_start = torch.where(is_image, index, image_start).amin(dim=1, keepdim=True)
        is_removed = (index >= start) & (index < image_start) & ~is_special
    if insertion.where == "question":
        is_removed = is_open & is_token & (index < last + 1 - (insertion.tail or 0))
    text = torch.tensor([int(i) for i in insertion.text], device=kinds.device)
    return _edit(_joined(text, rows, more), kinds, place.clamp(min=0), is_removed)


def _joined(text: Tensor, rows: int, more: Tensor | None) -> Tensor:
    """``[rows, tokens]`` ids of the same text and of one per row, -1 for none in front."""
    ids = text.expand(rows, text.shape[0])
    if more is None:
        return ids
    ids = torch.cat([ids, more.to(ids.device)], dim=1)
    return ids.gather(1, (ids >= 0).int().argsort(dim=1, stable=True))


def _is_in(input_ids: Tensor | None, known: Sequence[int], like: Tensor) -> Tensor:
    if input_ids is None or not known:
        return torch.zeros_like(like, dtype=torch.bool)
    return torch.isin(input_ids, torch.tensor(known, device=input_ids.device))


def _edit(ids: Tensor, kinds: Tensor, place: Tensor, is_removed: Tensor) -> Edit:
    rows, length = kinds.shape
    index = torch.arange(length + 1, device=kinds.device).expand(rows, length + 1)
    old = index[:, :-1]
    # Removed tokens sort to the left, among the padding; inserted ones right before their place.
    is_none, n_inserted = ids < 0, ids.shape[1]
    new_key = torch.where(is_none, -1, 2 * place - 1)
    key = torch.cat([2 * old.masked_fill(is_removed, -1), new_key], dim=1)
    kept = length + n_inserted - int((is_removed.sum(dim=1) + is_none.sum(dim=1)).min())
    order = key.argsort(dim=1, stable=True)[:, -kept:]
    is_text = (kinds != Columns.PADDING) & (kinds != Columns.IMAGE)
    last = torch.where(is_text, old, 0).amax(dim=1, keepdim=True)
    before, behind = (place - 1).clamp(min=0), place.clamp(max=length - 1)
    neighbour = torch.where(is_text.gather(1, behind), behind, last)
    neighbour = torch.where(is_text.gather(1, before) & (before < place), before, neighbour)
    sees_image = ((kinds == Columns.IMAGE) & (old < place)).any(dim=1, keepdim=True)
    new = torch.where(sees_image, Columns.INSTRUCTION, Columns.SYSTEM)
    new = new.expand(-1, n_inserted).masked_fill(is_none, Columns.PADDING).to(kinds.dtype)
    remaining = kinds.masked_fill(is_removed, Columns.PADDING)
    removed = torch.nn.functional.pad(is_removed.int().cumsum(dim=1), (1, 0))
    return Edit(
        ids=ids,
        order=order,
        place=place,
        neighbour=neighbour,
        shift=(~is_none).sum(dim=1, keepdim=True) * (index >= place).int() - removed,
        kinds=torch.cat([remaining, new], dim=1).gather(1, order),
    )


# -- in the arguments of a forward ------------------------------------------------------------
def with_insertion(
    kwargs: Mapping[str, Any], edit: Edit, embed: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Arguments of a forward over the edited prompt.

    Args:
        kwargs: Arguments of a forward over the whole prompt.
        edit: What to change.
        embed: Token ids to embeddings, for models that are given embeddings.
    """
    rows, tokens = edit.kinds.shape[0], edit.shift.shape[1] - 1
    ids = edit.ids.clamp(min=0)
    changed = dict(kwargs)
    for name, value in kwargs.items():
        if name == "input_ids" and value is not None:
            changed[name] = edit.with_new(value, ids.to(value.dtype))
        elif name == "inputs_embeds" and value is not None:
            changed[name] = edit.with_new(value, embed(ids).to(value.dtype))
        elif name == "position_ids" and value is not None:
            changed[name] = edit.of_positions(value)
        elif is_per_token(name, value, rows, tokens):
            changed[name] = edit.of_tokens(value)
    changed["attention_mask"] = edit.is_token.long()
    changed.pop("cache_position", None)
    return changed


def with_image_instruction(kwargs: Mapping[str, Any], insertion: Insertion) -> dict[str, Any]:
    """The instruction that the vision side of a model reads, with the text in it.

    Args:
        kwargs: What the user passed, with ``qformer_input_ids``.
        insertion: What to insert; ``system`` replaces the instruction.
    """
    given = kwargs["qformer_input_ids"]
    mask = kwargs.get("qformer_attention_mask")
    mask = torch.ones_like(given) if mask is None else mask
    kinds = torch.where(mask.bool(), Columns.SYSTEM, Columns.PADDING).to(torch.int8)
    where: Literal["start", "end"] = "end" if insertion.where == "end" else "start"
    edit = edit_of(replace(insertion, where=where, tail=0), kinds)
    if insertion.where == "system":
        edit = _edit(edit.ids, kinds, edit.place, kinds != Columns.PADDING)
    return {
        "qformer_input_ids": edit.with_new(given, edit.ids.to(given.dtype)),
        "qformer_attention_mask": edit.is_token.to(mask.dtype),
    }


def _gather(value: Tensor, index: Tensor) -> Tensor:
    """Entries ``[batch, chosen, ...]`` of ``[batch, tokens, ...]``."""
    shape = (*index.shape, *value.shape[2:])
    return value.gather(1, index.reshape(*index.shape, *[1] * (value.ndim - 2)).expand(shape))
