"""token_shift, and torch's own layers of what it returns."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.token_shift import token_shift


def shifted_projections(x: Tensor, shares: Tensor, weights: list[Tensor], previous: Tensor | None) -> list[Tensor]:
    mixed = token_shift(x, shares, previous=previous)
    return [F.linear(y, weight.to(y.dtype)) for y, weight in zip(mixed, weights, strict=True)]
