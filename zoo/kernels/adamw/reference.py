"""The formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    decayed: Sequence[bool],
    rates: Tensor,
    decays: Tensor,
    remaining: Tensor,
    scale: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    stacks = zip(parameters, gradients, means, squares, decayed, strict=True)
    for parameter, gradient, mean, square, has_decay in stacks:
        shape = (-1, *[1] * (parameter.dim() - 1))
        rate, decay = rates.view(shape), (decays if has_decay else torch.zeros_like(decays)).view(shape)
        g = gradient if scale is None else gradient * scale.view(shape)
        mean.lerp_(g, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        root = (square / remaining[1]).sqrt_()
        parameter.mul_(1 - rate * decay).sub_((mean * (rate / remaining[0])).div_(root.add_(eps)))
