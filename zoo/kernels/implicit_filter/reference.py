"""The definition, tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor


def implicit_filter(
    positions: Tensor, window: Tensor, layers: tuple[Tensor, ...], frequency: Tensor, out_weight: Tensor, length: int
) -> Tensor:
    taps = []
    for t in range(length):
        s = positions[t]
        for weight, bias in zip(layers[::2], layers[1::2], strict=True):
            s = torch.sin(frequency * ((weight * s).sum(1) + bias))
        taps.append((out_weight * s).sum(1) * window[t])
    return torch.stack(taps, dim=1)
