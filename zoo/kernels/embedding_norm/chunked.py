"""One after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.residual_norm import chunked
from zoo.kernels.token_embedding.chunked import token_embedding


def embedding_norm(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    eps: float,
    dtype: torch.dtype,
    lookup: bool,
) -> tuple[Tensor, Tensor]:
    return chunked.residual_norm(token_embedding(tokens, table), None, weight, bias, None, kind, eps, dtype)
