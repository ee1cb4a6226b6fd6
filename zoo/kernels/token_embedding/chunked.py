"""torch's own lookup."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def token_embedding(tokens: Tensor, table: Tensor) -> Tensor:
    return F.embedding(tokens, table)
