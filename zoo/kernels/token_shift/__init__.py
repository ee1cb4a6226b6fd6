"""Mixtures of each token with the one before it, as RWKV's projections take them."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def token_shift(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None = None,
    *,
    previous: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """y^i_t = x_t + (x_{t-1} - x_t) * (weight^i + offset^i_t) for each i of N, in fp32 (fp64 for fp64 inputs).

    Args:
        x: (B, T, D).
        weight: (N, D).
        offset: (N, B, T, D), what the data add to the weights, as in RWKV-6 (arXiv 2404.05892, eq. 14).
        previous: (B, D), the token before the first; None: zeros.
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y^1, ..., y^N, each (B, T, D) in x's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.

    Source: arXiv 2305.13048, eq. 11 to 13; with one weight a projection.
    """
    check_shapes("token_shift", x=(x, "BTD"), weight=(weight, "ND"), offset=(offset, "NBTD"), previous=(previous, "BD"))
    module = backend(__name__, IMPLS, impl, x.device)
    with full_precision(x):
        return tuple(module.token_shift(x, weight, offset, previous))
