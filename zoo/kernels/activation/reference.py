"""The definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def activation(x: Tensor, bias: Tensor, kind: str, scale: float) -> Tensor:
    wide = state_dtype(x.dtype)
    u = x.to(wide) + bias.to(wide)
    zero = torch.zeros_like(u)
    if kind == "softplus":
        return scale * torch.logaddexp(u, zero)
    if kind == "logsigmoid":
        return -scale * torch.logaddexp(-u, zero)
    return scale * (1 / (1 + torch.exp(-u)) if kind == "sigmoid" else torch.exp(u))
