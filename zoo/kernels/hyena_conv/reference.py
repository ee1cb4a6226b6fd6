"""The definition, sum by sum."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def _causal(x: Tensor, taps: Tensor) -> Tensor:
    """sum_j taps[:, j] x_{t-j} for x (B, T, D), taps (D, L)."""
    outputs = []
    for t in range(x.shape[1]):
        latest_first_BjD = x[:, max(t + 1 - taps.shape[1], 0) : t + 1].flip(1)
        outputs.append((latest_first_BjD * taps.T[: latest_first_BjD.shape[1]]).sum(1))
    return torch.stack(outputs, dim=1)


def hyena_conv(x1: Tensor, x2: Tensor, v: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
    wide = state_dtype(v.dtype)
    inputs = (x.to(wide) for x in (x1, x2, v))
    taps, shifts = weight.flip(2).to(wide), bias.to(wide)
    c1, c2, c3 = (_causal(x, w) + b for x, w, b in zip(inputs, taps, shifts, strict=True))
    u = c1 * c3
    return (c2 * (_causal(u, kernel.to(wide)) + skip.to(wide) * u)).to(v.dtype)
