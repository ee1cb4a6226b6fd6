"""The formulas."""

from __future__ import annotations

from torch import Tensor


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rates: Tensor,
    decays: Tensor,
    unbias: Tensor,
    scale: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    shape = (-1, *[1] * (parameter.dim() - 1))
    rate, decay = rates.view(shape), decays.view(shape)
    g = gradient if scale is None else gradient * scale.view(shape)
    mean.lerp_(g, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    root = (square * unbias[1]).sqrt_()
    parameter.mul_(1 - rate * decay).sub_((mean * (rate * unbias[0])).div_(root.add_(eps)))
