"""torch's own layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def projections(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [F.linear(x, weight.to(x.dtype)) for weight in weights]
