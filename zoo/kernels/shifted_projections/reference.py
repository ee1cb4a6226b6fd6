"""The definition, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def shifted_projections(x: Tensor, shares: Tensor, weights: list[Tensor], previous: Tensor | None) -> list[Tensor]:
    wide = x.to(state_dtype(x.dtype))
    before = torch.zeros_like(wide[:, 0]) if previous is None else previous.to(wide)
    ys: list[list[Tensor]] = [[] for _ in weights]
    for now in wide.unbind(1):
        for y, share, weight in zip(ys, shares.to(wide), weights, strict=True):
            y.append((now + (before - now) * share) @ weight.to(wide).T)
        before = now
    return [torch.stack(y, dim=1).to(x.dtype) for y in ys]
