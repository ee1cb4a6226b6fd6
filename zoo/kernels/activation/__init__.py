"""Steps and decays: a smooth function of a projection and a bias, in fp32 whatever the projection is in."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")
Kind = Literal["softplus", "logsigmoid", "sigmoid", "exp"]


def activation(x: Tensor, bias: Tensor, kind: Kind, *, scale: float = 1.0, impl: str | None = None) -> Tensor:
    """y = scale * f(x + bias), f one of softplus(u) = log(1 + e^u), logsigmoid, sigmoid and exp.

    Args:
        x: (B, T, D).
        bias: (D,).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y (B, T, D) in fp32 (fp64 for fp64 x).

    Raises:
        UnsupportedError: shapes do not fit, the kind is unknown, or there is no such backend.
    """
    check_shapes("activation", x=(x, "BTD"), bias=(bias, "D"))
    if kind not in get_args(Kind):
        raise UnsupportedError(f"activation: kind {kind!r} is unknown; use one of {', '.join(get_args(Kind))}.")
    module = backend(__name__, IMPLS, impl, x.device)
    with full_precision(x):
        return module.activation(x, bias, kind, scale)
