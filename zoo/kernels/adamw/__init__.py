"""One step of AdamW for a stack of parameters, each with a learning rate and a weight decay of its own, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import backend

IMPLS = ("reference", "triton")


@torch.no_grad()
def adamw(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rates: Tensor,
    decays: Tensor,
    unbias: Tensor,
    scale: Tensor | None = None,
    *,
    betas: tuple[float, float],
    eps: float,
    impl: str | None = None,
) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2) with g = scale gradient, for each member of a stack:

        m <- beta_1 m + (1 - beta_1) g;  v <- beta_2 v + (1 - beta_2) g^2
        p <- (1 - rate decay) p - rate (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + eps)

    Args:
        parameter, gradient, mean, square: (P, ...) in fp32; all but the gradient are changed.
        rates, decays, scale: (P,); scale None: 1.
        unbias: (2,), 1 / (1 - beta^t) for each beta at step t: see `unbiasing`.
        impl: "reference", "triton", or None to choose by device.
    """
    impl = impl or ("triton" if parameter.is_cuda else "reference")
    backend(__name__, IMPLS, impl, parameter.device).adamw(
        parameter, gradient, mean, square, rates, decays, unbias, scale, betas, eps
    )


def unbiasing(betas: tuple[float, float], count: Tensor) -> Tensor:
    """count (1,) in fp64, the number t of a step, from 1 -> 1 / (1 - beta^t) (2,) in fp32.

    The difference is of nearly equal numbers at the first steps, hence fp64.
    """
    return torch.cat([1 / (1 - beta**count) for beta in betas]).float()
