"""torch's own layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def projections(x: Tensor, weights: list[Tensor], biases: list[Tensor] | list[None]) -> list[Tensor]:
    pairs = zip(weights, biases, strict=True)
    return [F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)) for w, b in pairs]
