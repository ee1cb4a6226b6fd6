"""Sums of products, layer by layer."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import state_dtype


def projections(x: Tensor, weights: list[Tensor], biases: list[Tensor] | list[None]) -> list[Tensor]:
    wide = state_dtype(x.dtype)
    products = [(x.to(wide)[..., None, :] * weight.to(wide)).sum(-1) for weight in weights]
    sums = (y if bias is None else y + bias.to(wide) for y, bias in zip(products, biases, strict=True))
    return [y.to(x.dtype) for y in sums]
