"""Muon for the matrices, AdamW for everything else."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

__all__ = ["Muon", "cosine", "optimizers"]

# Newton-Schulz coefficients of Jordan et al., https://kellerjordan.github.io/posts/muon/
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, in float32 and for all matrices of a shape at once.

    ``torch.optim.Muon`` iterates in bfloat16, matrix by matrix; on processors without bfloat16
    arithmetic that takes longer than the model itself. The update is scaled by
    0.2 * sqrt(longer side), which gives it about the size of an AdamW update
    (Liu et al., arXiv 2502.16982, equation 4).

    Args:
        params: matrices, or filters, which count as matrices of one row for each output.
        lr: learning rate, on AdamW's scale.
        momentum: 0 to 1, Nesterov's form.
        weight_decay: decoupled, per unit of learning rate.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.flatten(1).shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group)
        return loss

    def _update(
        self, parameters: list[nn.Parameter], shape: torch.Size, group: dict[str, Any]
    ) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(state["momentum"], group["momentum"])
            updates.append(update.flatten(1))
        scale = 0.2 * max(shape) ** 0.5 * group["lr"]
        for parameter, update in zip(parameters, _orthogonal(torch.stack(updates)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(update.view_as(parameter), alpha=scale)


def optimizers(
    parameters: dict[str, nn.Parameter], *, matrix_lr: float, other_lr: float
) -> list[torch.optim.Optimizer]:
    """Give matrices and filters to Muon, and embeddings, heads, biases and norms to AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        looked_up = any(part in name for part in ("embed_tokens", "position_embedding", "heads"))
        is_matrix = parameter.dim() >= 2 and not looked_up and "lm_head" not in name
        (matrices if is_matrix else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.01)
    return [Muon(matrices, matrix_lr), adamw]


def cosine(step: int, steps: int, warmup: int) -> float:
    """Return the learning-rate factor of a step: a linear warm-up, then a cosine down to 0.05."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * (0.525 + 0.475 * math.cos(math.pi * step / max(steps, 1)))


def _orthogonal(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix of ``[count, rows, columns]`` towards one."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
