"""What a selective scan takes beside x: steps, inputs and outputs, which depend on the token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


class SelectiveInputs(NamedTuple):
    """x again; dt (B, T, D) before its bias and softplus; B and C (B, T, N)."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


def selective_inputs(x: Tensor, weight: Tensor, dt_weight: Tensor, *, impl: str | None = None) -> SelectiveInputs:
    """r, B, C = weight x; dt = dt_weight r (arXiv 2312.00752, section 3.6), summed in fp32; r too is in x's dtype.

    The gradient of x is that of the x that is returned and that of its products, in one sum.

    Args:
        x: (B, T, D).
        weight: (R + 2 N, D), in x's dtype or wider; its gradient is in its own.
        dt_weight: (D, R), likewise.
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        x, dt, B and C, in x's dtype; under autocast in its.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    check_shapes("selective_inputs", x=(x, "BTD"), weight=(weight, "MD"), dt_weight=(dt_weight, "DR"))
    rest = len(weight) - dt_weight.shape[1]
    if rest < 2 or rest % 2:
        raise UnsupportedError(
            f"selective_inputs: weight has {len(weight)} rows; expected R + 2 N, R = {dt_weight.shape[1]} as dt_weight "
            "has it."
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with full_precision(x):
        return SelectiveInputs(*backend(__name__, IMPLS, impl, x.device).selective_inputs(x, weight, dt_weight))
