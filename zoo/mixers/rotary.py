"""Rotary positions: queries and keys turned by their position, so that scores depend on distances alone."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def rotate(x: Tensor, start: int | Tensor = 0, base: float = 10_000.0) -> Tensor:
    """x (B, T, H, K), K even, turned by its positions start, start + 1, ...: same shape and dtype.

    Channels c and c + K/2 are one plane, turned by position * base^(-2c/K). Source: arXiv 2104.09864, eq. 15 and 34.
    """
    T, K = x.shape[1], x.shape[3]
    # Angles in fp64: in fp32 they are off by 1e-4 at position 1000, and the decode would differ from the parallel form.
    position = start + torch.arange(T, dtype=torch.float64, device=x.device)
    frequency = base ** (-torch.arange(0, K, 2, dtype=torch.float64, device=x.device) / K)
    angle = (position[:, None] * frequency)[:, None, :]
    cos, sin = angle.cos().to(state_dtype(x.dtype)), angle.sin().to(state_dtype(x.dtype))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
