"""What stands between two layers: a branch joins the residual stream, and the stream is normalised for the next."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")
Kind = Literal["layer", "rms"]


class ResidualNorm(NamedTuple):
    """stream (..., D) in x's dtype; normed (..., D), under autocast in its dtype."""

    stream: Tensor
    normed: Tensor


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Kind = "layer",
    eps: float = 1e-5,
    positions: Tensor | None = None,
    lookup: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> ResidualNorm:
    """stream = x + branch; normed = weight * (stream - mean) / sqrt(var + eps) + bias (arXiv 1607.06450, eq. 4).

    Mean and variance are over the D channels; kind="rms" has no mean: weight * stream / sqrt(mean(stream^2) + eps)
    (arXiv 1910.07467, eq. 4). All in fp32 (fp64 for fp64 inputs), whatever the dtypes.

    Args:
        x, branch: (..., D); without a branch, the stream is x.
        weight, bias: (D,).
        positions: (B, Q) int64 in [0, T), for x (B, T, D): the stream is wanted there alone, (B, Q, D).
        lookup: of an x (B, T, D) that embedding_norm made with `lookup`, its tokens (B, T) and table (V, D), of which
            "triton" reads rows in place of x.
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        stream (..., D), or at the positions, in x's dtype; normed (..., D).

    Raises:
        UnsupportedError: shapes do not fit, the kind is unknown, or there is no such backend.
    """
    rows = [None if y is None else y.flatten(0, -2) for y in (x, branch)]
    check_shapes("residual_norm", x=(rows[0], "MD"), branch=(rows[1], "MD"), weight=(weight, "D"), bias=(bias, "D"))
    if positions is not None:
        check_shapes("residual_norm", x=(x, "BTD"), positions=(positions, "BQ"))
    if lookup is not None:
        check_shapes("residual_norm", x=(x, "BTD"), tokens=(lookup[0], "BT"), table=(lookup[1], "VD"))
    if kind not in ("layer", "rms"):
        raise UnsupportedError(f"residual_norm: kind {kind!r} is unknown; use 'layer' or 'rms'.")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    module = backend(__name__, IMPLS, impl, x.device)
    with full_precision(x):
        return ResidualNorm(*module.residual_norm(x, branch, weight, bias, positions, kind, eps, dtype, lookup))
