"""Hyena's operator: a long convolution between two gates, after a short one of each input."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes
from zoo.kernels.short_conv import MAX_WIDTH

IMPLS = ("reference", "chunked", "triton")


def hyena_conv(
    x1: Tensor,
    x2: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor,
    skip: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """y = c2(x2) * (kernel conv u + skip * u), u = c1(x1) * c3(v) (arXiv 2302.10866, definition 3.1, order 2).

    c1, c2 and c3 are short causal convolutions with the three parts of weight and bias, laid out as for `short_conv`.

    Args:
        x1, x2, v: (B, T, D).
        weight: (3, D, W), W <= 8.
        bias: (3, D).
        kernel: (D, L), its first tap meets the present token. The sum ends with the last tap or the first input.
        skip: (D,).
        impl: "reference", "chunked", "triton" or None (by device).

    Returns:
        y (B, T, D) in v's dtype, summed in fp32 (fp64 for fp64).

    Raises:
        UnsupportedError: W > 8, an unknown backend, or shapes that do not fit.
    """
    sizes = check_shapes(
        "hyena_conv",
        x1=(x1, "BTD"),
        x2=(x2, "BTD"),
        v=(v, "BTD"),
        weight=(weight, "GDW"),
        bias=(bias, "GD"),
        kernel=(kernel, "DL"),
        skip=(skip, "D"),
    )
    if sizes["G"] != 3 or not 1 <= sizes["W"] <= MAX_WIDTH or 0 in sizes.values():
        raise UnsupportedError(
            f"hyena_conv: v is {tuple(v.shape)}, weight {tuple(weight.shape)}, kernel {tuple(kernel.shape)}; weight "
            f"must be (3, D, W), W from 1 to {MAX_WIDTH}, and no axis may be empty."
        )
    module = backend(__name__, IMPLS, impl, v.device)
    # Autocast would take products in half precision.
    with full_precision(v):
        return module.hyena_conv(x1, x2, v, weight, bias, kernel, skip)
