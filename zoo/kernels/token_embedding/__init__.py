"""Rows of a table by token; the gradient adds them up in an order of its own, so that it is the same every time."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def token_embedding(tokens: Tensor, table: Tensor, *, impl: str | None = None) -> Tensor:
    """x_t = table[tokens_t]; dtable_v = sum over t with tokens_t = v of dx_t, in fp32.

    Args:
        tokens: (...) int32 or int64 in [0, V).
        table: (V, D).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        x (..., D) in the table's dtype.

    Raises:
        UnsupportedError: the table has no two axes, tokens are no integers, or there is no such backend.
    """
    check_shapes("token_embedding", table=(table, "VD"))
    if tokens.is_floating_point():
        raise UnsupportedError(f"token_embedding: tokens are {tokens.dtype}; give torch.int32 or torch.int64.")
    return backend(__name__, IMPLS, impl, table.device).token_embedding(tokens, table)
