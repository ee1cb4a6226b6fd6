"""The definitions, index by index."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def outer_product(k: Tensor, v: Tensor) -> Tensor:
    wide = state_dtype(k.dtype)
    row = [torch.stack([k_i.to(wide) * v_j.to(wide) for v_j in v.unbind(2)], dim=2) for k_i in k.unbind(2)]
    return torch.stack(row, dim=2).to(k.dtype)


def read_product(q: Tensor, s: Tensor) -> Tensor:
    wide = state_dtype(s.dtype)
    pairs = zip(q.unbind(2), s.unbind(2), strict=True)
    return torch.stack([q_i.to(wide)[:, :, None] * s_i.to(wide) for q_i, s_i in pairs]).sum(0).to(q.dtype)
