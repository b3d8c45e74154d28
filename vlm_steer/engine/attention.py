"""THE attention function: the model's own kernel, then only the rows that a method steers.

``steered_attention`` stands behind a name registered with transformers' ``AttentionInterface``,
so that every model that dispatches through that interface reaches it without being patched. It
calls the implementation that the model used before, for all rows, and lets ``Rows`` recompute the
steered ones in blocks: no tensor is ever ``[batch, heads, sequence, sequence]``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_steer.engine.active import ACTIVE, Enough, Probe
from vlm_steer.engine.call import Touch
from vlm_steer.engine.forward import EditedMask, Forward, Mask, dense_rows
from vlm_steer.engine.model import eager_function
from vlm_steer.engine.plan import Work
from vlm_steer.engine.rows import Rows, Seen, put
from vlm_steer.errors import UnsupportedModelError

__all__ = ["base_name", "key_for", "routed", "steered_attention"]

# transformers sniffs attention names for "flash", "sdpa" and "/", hence the aliases.
_ALIASES = {
    "sdpa": "vlm_steer_fused",
    "eager": "vlm_steer_plain",
    "flex_attention": "vlm_steer_blocks",
}
_BASES = {alias: base for base, alias in _ALIASES.items()}

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def key_for(implementation: str) -> str:
    """The registered name under which an implementation runs with steering.

    Raises:
        UnsupportedModelError: Steering on top of this implementation is not supported.
    """
    if implementation in _BASES:
        return implementation
    if implementation not in _ALIASES:
        raise UnsupportedModelError(
            f"the language model uses attn_implementation={implementation!r}, on which steering "
            f"is not supported. Load it with {' or '.join(map(repr, _ALIASES))}."
        )
    key = _ALIASES[implementation]
    if key not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(key, partial(steered_attention, implementation))
        # Without its own mask entry a registered name gets no mask at all: causality would go.
        AttentionMaskInterface.register(key, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return key


@contextmanager
def routed(configs: Sequence[Any]) -> Iterator[None]:
    """Let a model that is not steered reach the attention function, for as long as it is watched.

    What other threads run on the model meanwhile gets what its own kernel returns.
    """
    before = [config._attn_implementation for config in configs]
    for config, implementation in zip(configs, before, strict=True):
        config._attn_implementation_internal = key_for(implementation)
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def base_name(key: str) -> str:
    """The implementation behind a name, registered by us or not."""
    return _BASES.get(key, key)


def steered_attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with whatever the running call asks for at this module.

    Args:
        implementation: The implementation the model used before it was attached to.
        module: The attention module.
        query: ``[batch, heads, rows, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``, cache included.
        value: ``[batch, kv_heads, keys, value_dim]``.
        attention_mask: ``[batch, 1, rows, keys]`` bool or additive, or the block mask of
            flex attention; ``None`` is plain causality.
        **options: What the model passes to its attention function.

    Returns:
        ``[batch, rows, heads, value_dim]`` and the implementation's own second result.
    """
    base = partial(_base_function(implementation, module), module, **options)
    forward = ACTIVE.get()
    site = None if forward is None else forward.sites.get(module)
    if forward is None or site is None:
        return base(query, key, value, attention_mask)
    if isinstance(forward, Probe):
        forward.watch(site, query, key)
        outputs, extra = base(query, key, value, attention_mask)
        forward.see(site, outputs)
        return outputs, extra
    work = forward.work(site)
    if work is None:
        return base(query, key, value, attention_mask)
    is_blind = None
    if work.mask:
        _, attention_mask, is_blind = _edited_mask(forward, work, query, key, attention_mask)
    extra, seen = None, Seen()
    if work.needs_rows:
        rows = Rows(forward, work, module, query, key, value, attention_mask, options)
        with _uncast(query.device):
            rows.tally()
        if site.layer == forward.last:
            raise Enough
        if rows.are_all_replaced:
            with _uncast(query.device):
                outputs = rows.recomputed()
        else:
            outputs, extra = base(query, key, value, attention_mask)
            with _uncast(query.device):
                rows.steer(outputs)
        seen = rows.seen
    else:
        outputs, extra = base(query, key, value, attention_mask)
    if is_blind is not None:
        outputs = outputs.masked_fill(is_blind[:, :, None, None], 0)
    if work.heads:
        outputs = _edited_heads(forward, work, outputs, seen)
    return outputs, extra


def _uncast(device: torch.device) -> AbstractContextManager[object]:
    """Keeps the user's autocast from lowering the precision of what hooks are given and return."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _base_function(implementation: str, module: nn.Module) -> AttentionFunction:
    if implementation != "eager":
        function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[implementation]
        return function
    eager = eager_function(type(module))
    if eager is not None:
        return eager
    raise UnsupportedModelError(
        f"{type(module).__name__} has no eager attention function beside it. Load the model with "
        "attn_implementation='sdpa'."
    )


def _edited_heads(forward: Forward, work: Work, outputs: Tensor, seen: Seen) -> Tensor:
    """Apply the ``heads`` hooks to ``[batch, rows, heads, head_dim]``."""
    length = outputs.shape[1]
    for bound, stream in forward.acting("heads", work.heads):
        start = forward.first_row([(bound, stream)])
        if start == length:
            continue
        columns = forward.no_columns(stream, outputs.device)
        at = forward.at(
            *(bound, stream, work.site.layer, (start, length), columns), seen=seen.by(bound, stream)
        )
        old = outputs[stream.batch, start:]
        new = bound.method.heads(old, at).to(outputs.dtype)
        if not forward.every_row_changes(bound.method.rows, stream):
            new = torch.where(at.is_row[:, :, None, None], new, old)
        if forward.call.is_measured:
            forward.touch(bound, work.site.layer, Touch.of_heads(old, new))
        if new.shape == outputs.shape:
            outputs = new
        else:
            outputs = outputs.clone()
            outputs[stream.batch, start:] = new
    return outputs


def _edited_mask(
    forward: Forward,
    work: Work,
    query: Tensor,
    key: Tensor,
    attention_mask: Mask | None,
) -> EditedMask:
    """Apply the ``mask`` hooks; layers that share a mask share the result."""
    axis = work.site.axis
    length, n_keys = query.shape[2], key.shape[2]
    acting = [
        (bound, stream)
        for bound, stream in forward.acting("mask", work.mask)
        if forward.first_row([(bound, stream)]) < length
    ]
    if not acting:
        return EditedMask(attention_mask, attention_mask)
    name = (id(attention_mask), axis, n_keys, tuple(bound.index for bound, _ in acting))
    if name in forward.masks:
        return forward.masks[name]
    allowed = _allowed(query, key, attention_mask, axis)
    is_even = is_blind = None
    if axis == "cross":
        # Rows that a cross-attention mask closes altogether attend evenly to every column.
        is_even = ~allowed.any(dim=-1, keepdim=True)
        allowed = allowed | is_even
    for bound, stream in acting:
        columns = forward.columns(stream, n_keys, axis, query.device)
        at = forward.at(bound, stream, work.site.layer, (0, length), columns)
        old = allowed[stream.batch]
        new = torch.where(at.is_row[:, :, None], bound.method.mask(old, at), old)
        if forward.call.is_measured:
            forward.touch(bound, work.site.layer, Touch.of_rows(old, new))
        allowed = put(allowed, stream.batch, new)
    if is_even is not None:
        is_blind = ~allowed.any(dim=-1)
        allowed = allowed & ~is_even
    edited: Mask
    if isinstance(attention_mask, BlockMask):
        edited = _block_mask(allowed)
    elif attention_mask is None or attention_mask.dtype == torch.bool:
        edited = allowed[:, None]
    else:
        closed = torch.finfo(attention_mask.dtype).min
        open_before = attention_mask > closed / 2
        opened = torch.where(open_before, attention_mask, torch.zeros_like(attention_mask))
        edited = torch.where(allowed[:, None], opened, torch.full_like(opened, closed))
    forward.masks[name] = EditedMask(attention_mask, edited, is_blind)
    return forward.masks[name]


def _block_mask(allowed: Tensor) -> BlockMask:
    """The block mask of flex attention for ``[batch, rows, key]`` bool."""

    def is_allowed(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return allowed[batch, row, column]

    batch, rows, keys = allowed.shape
    return create_block_mask(is_allowed, batch, None, rows, keys, device=str(allowed.device))


def _allowed(
    query: Tensor, key: Tensor, attention_mask: Mask | None, axis: Literal["self", "cross"]
) -> Tensor:
    """``[batch, rows, key]`` bool of an attention mask in any of its forms."""
    batch, length, n_keys = query.shape[0], query.shape[2], key.shape[2]
    if attention_mask is None and axis == "cross":
        return torch.ones((batch, length, n_keys), dtype=torch.bool, device=query.device)
    if attention_mask is None:
        row = torch.arange(n_keys - length, n_keys, device=query.device)[:, None]
        allowed = torch.arange(n_keys, device=query.device)[None, :] <= row
        return allowed.expand(batch, length, n_keys)
    if isinstance(attention_mask, BlockMask):
        attention_mask = dense_rows(attention_mask, 0, length, n_keys)
    mask = attention_mask[:, 0, :, :n_keys]
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask.expand(batch, length, n_keys)
