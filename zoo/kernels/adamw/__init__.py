"""One step of AdamW for stacks of parameters, whose members have a learning rate and a weight decay each, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels.backend import backend

IMPLS = ("reference", "triton")


@torch.no_grad()
def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    decayed: Sequence[bool],
    rates: Tensor,
    decays: Tensor,
    remaining: Tensor,
    scale: Tensor | None = None,
    *,
    betas: tuple[float, float],
    eps: float,
    impl: str | None = None,
) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2) with g = scale gradient, for each member of each stack:

        m <- beta_1 m + (1 - beta_1) g;  v <- beta_2 v + (1 - beta_2) g^2
        p <- (1 - rate decay) p - rate (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + eps)

    Args:
        parameters, gradients, means, squares: of each stack (P, ...) in fp32; all but the gradients are changed.
        decayed: of each stack, whether it has weight decay; where not, decay is 0.
        rates, decays, scale: (P,); scale None: 1.
        remaining: (2,), 1 - beta^t for each beta at step t: see `bias_corrections`.
        impl: "reference", "triton", or None to choose by device.
    """
    impl = impl or ("triton" if rates.is_cuda else "reference")
    backend(__name__, IMPLS, impl, rates.device).adamw(
        parameters, gradients, means, squares, decayed, rates, decays, remaining, scale, betas, eps
    )


def bias_corrections(log_betas: Tensor, count: Tensor) -> Tensor:
    """Logarithms of the betas (2,), count (1,), the number t of a step, from 1 -> 1 - beta^t (2,), all in fp64."""
    return -torch.expm1(count * log_betas)
