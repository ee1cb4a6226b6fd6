"""The definition, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def ssd_inputs(BC: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, C = BC.unbind(2)
    wide = state_dtype(dt.dtype)
    heads = range(dt.shape[2])
    group = [h * B.shape[2] // dt.shape[2] for h in heads]
    u = dt.to(wide) + bias.to(wide)
    step = torch.logaddexp(u, torch.zeros_like(u))
    q = torch.stack([C[:, :, group[h]] for h in heads], dim=2)
    k = torch.stack([step[:, :, h, None] * B[:, :, group[h]].to(wide) for h in heads], dim=2)
    return q, k.to(B.dtype), -torch.exp(log_A.to(wide)) * step
