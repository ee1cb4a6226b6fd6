"""A sum of products."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import state_dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = state_dtype(x.dtype)
    y = (x.to(wide)[..., None, :] * weight.to(wide)).sum(-1)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
