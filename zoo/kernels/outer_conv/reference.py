"""The definition, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def outer_conv(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
    dtype = q.dtype
    q, k, v, kernel, skip = (x.to(state_dtype(dtype)) for x in (q, k, v, kernel, skip))
    k = k.permute(0, 3, 1, 2)
    outputs = []
    for t in range(q.shape[1]):
        taps_lH = kernel[:, : t + 1].flip(1).T
        past = slice(t + 1 - len(taps_lH), t + 1)
        kv_BlIJH = k[:, past, :, None] * v[:, past, None]
        s_BIJH = (taps_lH[:, None, None] * kv_BlIJH).sum(1) + skip * kv_BlIJH[:, -1]
        outputs.append((q[:, t, :, None] * s_BIJH).sum(1))
    return torch.stack(outputs, dim=1).to(dtype)
