"""Hyena's filters: an MLP with sine activations of the position, under a window."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")
# Hidden units that a program holds: wider ones take impl="chunked".
WIDEST = 128


def implicit_filter(
    positions: Tensor,
    window: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
    frequency: Tensor,
    out_weight: Tensor,
    length: int,
    *,
    impl: str | None = None,
) -> Tensor:
    """h_t = window_t * W_out s_3, s_i = sin(frequency * (W_i s_{i-1} + b_i)), s_0 = positions_t (arXiv 2302.10866).

    Neither positions nor window have a gradient.

    Args:
        positions: (L, F), features of each position, in fp32 (or fp64) as all others.
        window: (L, D).
        weight_1: (N, F); weight_2, weight_3: (N, N); out_weight: (D, N).
        bias_1, bias_2, bias_3, frequency: (N,).
        length: how many taps, at most L.
        impl: "reference", "chunked", "triton" (N up to 128), or None to choose by device and N.

    Returns:
        h (D, length).

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    sizes = check_shapes(
        "implicit_filter",
        positions=(positions, "LF"),
        window=(window, "LD"),
        weight_1=(weight_1, "NF"),
        bias_1=(bias_1, "N"),
        weight_2=(weight_2, "NN"),
        bias_2=(bias_2, "N"),
        weight_3=(weight_3, "NN"),
        bias_3=(bias_3, "N"),
        frequency=(frequency, "N"),
        out_weight=(out_weight, "DN"),
    )
    if impl is None and sizes["N"] > WIDEST:
        impl = "chunked"
    module = backend(__name__, IMPLS, impl, positions.device)
    layers = (weight_1, bias_1, weight_2, bias_2, weight_3, bias_3)
    # Autocast would round neighbouring positions to one number.
    with full_precision(positions):
        return module.implicit_filter(positions, window, layers, frequency, out_weight, length)
