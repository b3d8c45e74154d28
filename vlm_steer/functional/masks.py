"""Who may see whom: attention masks and the geometry behind them (MMA, CCA)."""

import torch
from torch import Tensor


def modality_mutual_mask(visual: Tensor, question: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Returns a causal mask in which image rows also see the question (MMA).

    `M_ij = (j <= i) or (i in image and j in question)` (arXiv 2503.02597, section 3.2). Image
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
    if mask is None:
        return allowed
    own = torch.eye(size, dtype=torch.bool, device=visual.device)
    return allowed & mask[:, None, :] | own


def concentric_rings(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Returns the ring of each cell of an image grid, its distance to the border (CCA).

    `ring(i, j) = min(i, j, height - 1 - i, width - 1 - j)` (arXiv 2410.15926, section 4). The
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
