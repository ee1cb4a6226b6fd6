"""torch's own layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def selective_inputs(x: Tensor, weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R = dt_weight.shape[1]
    N = (len(weight) - R) // 2
    r, B, C = F.linear(x, weight.to(x.dtype)).split([R, N, N], dim=-1)
    return x, F.linear(r, dt_weight.to(x.dtype)), B, C
