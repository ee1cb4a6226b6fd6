"""Outer products of a head's keys and values, a long convolution of each, and their read-out by a query (H3)."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def outer_conv(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, skip: Tensor, *, impl: str | None = None) -> Tensor:
    """y_tj = sum_i q_ti (sum_l kernel_l k_{t-l,i} v_{t-l,j} + skip k_ti v_tj), head by head (arXiv 2212.14052, alg. 1).

    There are many heads where they have few channels. The keys have time last, as `long_conv` gives it.

    Args:
        q: (B, T, I, H).
        k: (B, I, H, T).
        v: (B, T, J, H).
        kernel: (H, L), its first tap meets the present token. The sum ends with the last tap or the first input.
        skip: (H,).
        impl: "reference", "chunked", "triton" or None (by device).

    Returns:
        y (B, T, J, H) in q's dtype, summed in fp32 (fp64 for fp64).

    Raises:
        UnsupportedError: an unknown backend, or shapes that do not fit.
    """
    sizes = check_shapes(
        "outer_conv", q=(q, "BTIH"), k=(k, "BIHT"), v=(v, "BTJH"), kernel=(kernel, "HL"), skip=(skip, "H")
    )
    if 0 in sizes.values():
        raise UnsupportedError(
            f"outer_conv: k {tuple(k.shape)}, v {tuple(v.shape)}, kernel {tuple(kernel.shape)}: no axis may be empty."
        )
    module = backend(__name__, IMPLS, impl, q.device)
    # Autocast would take products in half precision.
    with full_precision(q):
        return module.outer_conv(q, k, v, kernel, skip)
