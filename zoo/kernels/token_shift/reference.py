"""The definition, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def token_shift(x: Tensor, weight: Tensor, offset: Tensor | None, previous: Tensor | None) -> list[Tensor]:
    wide = state_dtype(x.dtype)
    before = torch.zeros_like(x[:, 0]) if previous is None else previous
    outputs = []
    for i in range(len(weight)):
        y = []
        for t in range(x.shape[1]):
            share = weight[i].to(wide) if offset is None else weight[i].to(wide) + offset[i, :, t].to(wide)
            past = (x[:, t - 1] if t else before).to(wide)
            y.append(x[:, t].to(wide) + (past - x[:, t].to(wide)) * share)
        outputs.append(torch.stack(y, dim=1).to(x.dtype))
    return outputs
