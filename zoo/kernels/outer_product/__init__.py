"""Outer products of a head's keys and values, and their read-out by a query, for heads of few channels (H3)."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def outer_product(k: Tensor, v: Tensor, *, impl: str | None = None) -> Tensor:
    """s_ij = k_i v_j, head by head (arXiv 2212.14052, algorithm 1). The heads stand last, being many.

    Args:
        k: (B, T, I, H).
        v: (B, T, J, H).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        s (B, T, I, J, H) in k's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    check_shapes("outer_product", k=(k, "BTIH"), v=(v, "BTJH"))
    module = backend(__name__, IMPLS, impl, k.device)
    with full_precision(k):
        return module.outer_product(k, v)


def read_product(q: Tensor, s: Tensor, *, impl: str | None = None) -> Tensor:
    """y_j = sum_i q_i s_ij, head by head, summed in fp32 (fp64 for fp64 s).

    Args:
        q: (B, T, I, H).
        s: (B, T, I, J, H).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y (B, T, J, H) in q's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    check_shapes("read_product", q=(q, "BTIH"), s=(s, "BTIJH"))
    module = backend(__name__, IMPLS, impl, s.device)
    with full_precision(s):
        return module.read_product(q, s)
