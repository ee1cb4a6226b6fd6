"""Several linear layers of one input, whose gradients meet in a sum that the products make themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


def projections(x: Tensor, *weights: Tensor, impl: str | None = None) -> tuple[Tensor, ...]:
    """y^i = weight^i x for each weight, summed in fp32 (fp64 for fp64 x). Under autocast in its dtype.

    Args:
        x: (..., K).
        weights: each (N_i, K), in x's dtype or wider; a gradient is in its weight's own.
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y^1, ..., y^n, each (..., N_i) in x's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    for weight in weights:
        check_shapes("projections", x=(flat, "MK"), weight=(weight, "NK"))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    module = backend(__name__, IMPLS, impl, x.device)
    with torch.autocast(device, enabled=False):
        return tuple(module.projections(x.to(dtype), list(weights)))
