"""The few positions of a sequence that are asked for."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def gather_rows(x: Tensor, positions: Tensor, *, impl: str | None = None) -> Tensor:
    """y_q = x_p with p = positions_q; the gradient is 0 everywhere else, and a position may be asked twice.

    Args:
        x: (B, T, D).
        positions: (B, Q) int64 in [0, T).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y (B, Q, D) in x's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    check_shapes("gather_rows", x=(x, "BTD"), positions=(positions, "BQ"))
    return backend(__name__, IMPLS, impl, x.device).gather_rows(x, positions)
