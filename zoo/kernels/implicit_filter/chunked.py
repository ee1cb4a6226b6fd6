"""Linear layers and sines."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def implicit_filter(
    positions: Tensor, window: Tensor, layers: tuple[Tensor, ...], frequency: Tensor, out_weight: Tensor, length: int
) -> Tensor:
    h = positions[:length]
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        h = torch.sin(frequency * F.linear(h, weight, bias))
    return (F.linear(h, out_weight) * window[:length]).T
