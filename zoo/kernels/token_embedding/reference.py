"""A product with one-hot rows."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def token_embedding(tokens: Tensor, table: Tensor) -> Tensor:
    return F.one_hot(tokens.long(), len(table)).to(table.dtype) @ table
