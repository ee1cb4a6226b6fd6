"""A linear layer; as a pack, with a matrix for each member, one call forward and two back."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """y = weight x + bias, summed in fp32.

    Args:
        x: (..., K).
        weight: (N, K), in x's dtype or wider; its gradient is in its own.
        bias: (N,).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y (..., N) in x's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    check_shapes("linear", x=(flat, "MK"), weight=(weight, "NK"), bias=(bias, "N"))
    return backend(__name__, IMPLS, impl, x.device).linear(x, weight, bias)
