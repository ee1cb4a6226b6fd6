"""The residual stream, a branch added, at the few positions that are asked for."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def joined_rows(x: Tensor, branch: Tensor | None, positions: Tensor, *, impl: str | None = None) -> Tensor:
    """y_q = x_p + branch_p with p = positions_q; the gradient is 0 everywhere else, and a position may be asked twice.

    Args:
        x, branch: (B, T, D); without a branch, the rows of x.
        positions: (B, Q) int64 in [0, T).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y (B, Q, D) in x's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    check_shapes("joined_rows", x=(x, "BTD"), branch=(branch, "BTD"), positions=(positions, "BQ"))
    return backend(__name__, IMPLS, impl, x.device).joined_rows(x, branch, positions)
