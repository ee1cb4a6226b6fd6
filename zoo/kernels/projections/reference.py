"""Sums of products, layer by layer."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import state_dtype


def projections(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    wide = state_dtype(x.dtype)
    return [(x.to(wide)[..., None, :] * weight.to(wide)).sum(-1).to(x.dtype) for weight in weights]
