"""Several linear layers of one input, whose gradients meet in a sum that the products make themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend

IMPLS = ("reference", "chunked", "triton")


def projections(
    x: Tensor, *weights: Tensor, biases: Sequence[Tensor] | None = None, impl: str | None = None
) -> tuple[Tensor, ...]:
    """y^i = weight^i x + bias^i for each weight, summed in fp32 (fp64 for fp64 x). Under autocast in its dtype.

    Args:
        x: (..., K).
        weights: each (N_i, K), in x's dtype or wider; a gradient is in its weight's own.
        biases: one (N_i,) for each weight, or None: no biases.
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y^1, ..., y^n, each (..., N_i) in x's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise UnsupportedError(
                f"projections: a weight has shape {tuple(weight.shape)}; expected (N, K={x.shape[-1]}), as x has it."
            )
    given = [None] * len(weights) if biases is None else list(biases)
    sizes = [tuple(bias.shape) for bias in biases or ()]
    if biases is not None and sizes != [(len(weight),) for weight in weights]:
        raise UnsupportedError(f"projections: biases have shapes {sizes}; expected one (N,) for each weight (N, K).")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return tuple(backend(__name__, IMPLS, impl, x.device).projections(x, list(weights), given))
