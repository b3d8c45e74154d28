"""Who may see whom: attention masks and the geometry behind them (MMA, CCA, knockout)."""

import torch
from torch import Tensor


def modality_mutual_mask(visual: Tensor, question: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Returns a causal mask in which image rows also see the question (MMA).

    `M_ij = (j <= i) or (i in image and j in question)` (arXiv 2503.02597). Image
    rows stay causal among themselves, text rows stay causal. The official code handles one image
    and one turn; several images and turns here are unions.

    Args:
        visual: bool `[batch, sequence]`, image tokens.
        question: bool `[batch, sequence]`, tokens of the instruction that image rows may see.
        mask: bool `[batch, sequence]`, real tokens; False columns (padding) are hidden from
            every row but their own, so that no row is empty.

    Returns:
        bool `[batch, sequence, sequence]`, True where the row may attend the column.
    """
    size = visual.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=visual.device).tril()
    allowed = causal | (visual[:, :, None] & question[:, None, :])
    return _hide_padding(allowed, mask)


def knockout_mask(allowed: Tensor, rows: Tensor, columns: Tensor, *, own: Tensor) -> Tensor:
    """Closes some columns to some rows (attention knockout).

    `M_ij = False` for i in rows and j in columns (arXiv 2304.14767), except that a token keeps
    seeing itself, so that no row of self-attention is left with nothing.

    Args:
        allowed: bool `[batch, query, key]`, True where the row may attend the column.
        rows: bool `[batch, query]`, rows that lose their view.
        columns: bool `[batch, key]`, columns that they lose.
        own: bool `[query, key]`, True where the column is the row's own token.

    Returns:
        bool `[batch, query, key]`.
    """
    return allowed & ~(rows[:, :, None] & columns[:, None, :] & ~own)


def concentric_rings(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Returns the ring of each cell of an image grid, its distance to the border (CCA).

    `ring(i, j) = min(i, j, height - 1 - i, width - 1 - j)` (arXiv 2410.15926). The
    official code knows the 24 x 24 grid only; any other follows the same closed form.

    Args:
        height: rows of the grid, >= 1.
        width: columns of the grid, >= 1.
        device: where to put the result.

    Returns:
        int64 `[height, width]`, 0 at the border.
    """
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    vertical = torch.minimum(rows, rows.flip(0))
    horizontal = torch.minimum(columns, columns.flip(0))
    return torch.minimum(vertical[:, None], horizontal[None, :])


def concentric_mask(rings: Tensor, images: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Returns a causal mask in which the tokens of an image see inwards only (CCA).

    Within one image, `u` sees `v` when `ring(v) <= ring(u)`: the centre sees the periphery, one
    ring sees itself in both directions (arXiv 2410.15926). Everything else is causal.

    Args:
        rings: int64 `[batch, sequence]`, ring of each image token; read at image tokens only.
        images: int64 `[batch, sequence]`, number of the image a token belongs to, -1 for text.
        mask: bool `[batch, sequence]`, real tokens; False columns are hidden from every row but
            their own.

    Returns:
        bool `[batch, sequence, sequence]`, True where the row may attend the column.
    """
    size = rings.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=rings.device).tril()
    return _hide_padding(see_periphery(causal, (rings, images), (rings, images)), mask)


def see_periphery(
    allowed: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> Tensor:
    """Returns a mask whose rows see, of their own image, their ring and those around it (CCA).

    The rows at hand may be any part of the sequence: `concentric_mask` is this for all of it.

    Args:
        allowed: bool, broadcastable to `[batch, rows, keys]`; kept outside an image's own tokens.
        rows: int64 rings and images of the rows, each `[batch, rows]`; images -1 for text.
        columns: the same of the key columns, each `[batch, keys]`.

    Returns:
        bool `[batch, rows, keys]`, True where the row may attend the column.
    """
    (row_rings, row_images), (key_rings, key_images) = rows, columns
    same_image = row_images[:, :, None] == key_images[:, None, :]
    same_image &= (row_images >= 0)[:, :, None]
    return torch.where(same_image, key_rings[:, None, :] <= row_rings[:, :, None], allowed)


def concentric_positions(rings: Tensor, images: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Returns position ids in which an image is as long as it has rings (CCA).

    Text counts on as usual; an image that starts at position p holds positions `p + ring`, and
    the text after it starts at `p + number of rings` (arXiv 2410.15926).

    Args:
        rings: int64 `[batch, sequence]`, ring of each image token; read at image tokens only.
        images: int64 `[batch, sequence]`, number of the image a token belongs to, -1 for text;
            the tokens of an image are contiguous, and images are numbered from 0.
        mask: bool `[batch, sequence]`, real tokens; padding gets position 0 and takes no room.

    Returns:
        int64 `[batch, sequence]`.
    """
    is_image = images >= 0
    inside = torch.where(is_image, rings, 0)
    index = torch.where(is_image, images, 0)
    n_rings = torch.zeros_like(rings).scatter_reduce(
        -1, index, torch.where(is_image, rings + 1, 0), reduce="amax"
    )
    previous = torch.cat([torch.full_like(images[:, :1], -1), images[:, :-1]], dim=-1)
    starts = is_image & (images != previous)
    real = torch.ones_like(is_image) if mask is None else mask
    # An image takes its whole room at its first token; what counts is the room taken before.
    room = torch.where(starts, n_rings.gather(-1, index), (~is_image).long()) * real
    offset = torch.where(is_image, n_rings.gather(-1, index), (~is_image).long())
    return (room.cumsum(-1) - offset + inside) * real


def _hide_padding(allowed: Tensor, mask: Tensor | None) -> Tensor:
    """Closes the columns of padding, except to themselves, so that no row is empty."""
    if mask is None:
        return allowed
    own = torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
    return allowed & mask[:, None, :] | own
