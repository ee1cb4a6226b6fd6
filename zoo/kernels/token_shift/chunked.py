"""The whole sequence beside itself, shifted by one."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def token_shift(x: Tensor, weight: Tensor, offset: Tensor | None, previous: Tensor | None) -> list[Tensor]:
    wide = x.to(state_dtype(x.dtype))
    before = torch.zeros_like(wide[:, 0]) if previous is None else previous.to(wide)
    change = torch.cat([before[:, None], wide[:, :-1]], dim=1) - wide
    shares = weight if offset is None else weight[:, None, None] + offset
    return [torch.addcmul(wide, change, share.to(wide)).to(x.dtype) for share in shares]
