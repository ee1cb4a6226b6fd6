"""The definition, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def shared_keys(C: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    wide = state_dtype(B.dtype)
    heads = range(dt.shape[2])
    group = [h * B.shape[2] // dt.shape[2] for h in heads]
    q = torch.stack([C[:, :, group[h]] for h in heads], dim=2)
    k = torch.stack([dt[:, :, h, None].to(wide) * B[:, :, group[h]].to(wide) for h in heads], dim=2)
    return q, k.to(B.dtype)
