"""Where a model begins: tokens become a residual stream, normalised for the first layer."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.residual_norm import Kind, ResidualNorm
from zoo.kernels.shapes import check_shapes

IMPLS = ("chunked", "triton")


def embedding_norm(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Kind = "layer",
    eps: float = 1e-5,
    lookup: bool = False,
    impl: str | None = None,
) -> ResidualNorm:
    """`residual_norm(token_embedding(tokens, table), None, weight, bias)`, without a pass over the stream between.

    Args:
        tokens: (B, T) int32 or int64 in [0, V).
        table: (V, D).
        weight, bias: (D,).
        lookup: the stream goes to residual_norm alone, with tokens and table as its `lookup`: by "triton" its elements
            are never written.
        impl: "chunked", "triton", or None to choose by device.

    Returns:
        stream (B, T, D) in the table's dtype, normed (B, T, D), under autocast in its dtype.

    Raises:
        UnsupportedError: shapes do not fit, tokens are no integers, or there is no such backend.
    """
    check_shapes("embedding_norm", tokens=(tokens, "BT"), table=(table, "VD"), weight=(weight, "D"), bias=(bias, "D"))
    if tokens.is_floating_point():
        raise UnsupportedError(f"embedding_norm: tokens are {tokens.dtype}; give torch.int32 or torch.int64.")
    device = table.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table.dtype
    module = backend(__name__, IMPLS, impl, table.device)
    with full_precision(table):
        return ResidualNorm(*module.embedding_norm(tokens, table, weight, bias, kind, eps, dtype, lookup))
