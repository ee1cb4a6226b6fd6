"""Tensors that are used whole and at a few positions, whose two gradients meet in one pass."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def kept_rows(positions: Tensor, *xs: Tensor, impl: str | None = None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Each x again, and y_q = x_p with p = positions_q; dx is that of x plus that of its rows, in fp32.

    Args:
        positions: (B, Q) int64 in [0, T).
        xs: each (B, T, D).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        The xs, and for each y (B, Q, D).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    for x in xs:
        check_shapes("kept_rows", x=(x, "BTD"), positions=(positions, "BQ"))
        if x.shape != xs[0].shape:
            raise UnsupportedError(f"kept_rows: xs have shapes {[tuple(x.shape) for x in xs]}; expected one shape.")
    kept, rows = backend(__name__, IMPLS, impl, positions.device).kept_rows(positions, list(xs))
    return tuple(kept), tuple(rows)
