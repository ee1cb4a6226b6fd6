"""Sums of products."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import state_dtype


def selective_inputs(x: Tensor, weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, R = state_dtype(x.dtype), dt_weight.shape[1]
    N = (len(weight) - R) // 2
    y = (x.to(wide)[..., None, :] * weight.to(wide)).sum(-1).to(x.dtype)
    r, B, C = y.split([R, N, N], dim=-1)
    return x, (r.to(wide)[..., None, :] * dt_weight.to(wide)).sum(-1).to(x.dtype), B, C
