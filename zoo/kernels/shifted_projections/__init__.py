"""Linear layers of each token mixed with the one before it, as RWKV's projections are."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def shifted_projections(
    x: Tensor, shares: Tensor, *weights: Tensor, previous: Tensor | None = None, impl: str | None = None
) -> tuple[Tensor, ...]:
    """y^i_t = weight^i (x_t + (x_{t-1} - x_t) * share^i) for each of n weights. Under autocast in its dtype.

    Mixtures and sums are in fp32 (fp64 for fp64 x).

    Args:
        x: (B, T, K).
        shares: (n, K).
        weights: n of them, each (N_i, K), in x's dtype or wider; a gradient is in its weight's own.
        previous: (B, K), the token before the first; None: zeros.
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y^1, ..., y^n, each (B, T, N_i) in x's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    Source: arXiv 2305.13048, eq. 11 to 13.
    """
    check_shapes("shifted_projections", x=(x, "BTK"), shares=(shares, "nK"), previous=(previous, "BK"))
    shapes = [tuple(weight.shape) for weight in weights]
    if len(shapes) != len(shares) or any(len(shape) != 2 or shape[1] != x.shape[-1] for shape in shapes):
        raise UnsupportedError(
            f"shifted_projections: weights have shapes {shapes}; expected one (N, K={x.shape[-1]}) for each of the "
            f"{len(shares)} shares."
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    module = backend(__name__, IMPLS, impl, x.device)
    with torch.autocast(device, enabled=False):
        return tuple(module.shifted_projections(x, shares, list(weights), previous))
