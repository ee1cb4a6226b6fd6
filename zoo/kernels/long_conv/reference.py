"""y_t = gate_t * (sum_j kernel[:, j] u_{t-j} + skip u_t), one output after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def long_conv(
    u: Tensor, kernel: Tensor, skip: Tensor | None, gate: Tensor | None, past: Tensor | None, time_last: bool
) -> Tensor:
    dtype = state_dtype(u.dtype)
    x, k = u.to(dtype), kernel.to(dtype)
    seen = x if past is None else torch.cat([past.to(dtype), x], dim=1)
    L = k.shape[1]
    outputs = []
    for t in range(seen.shape[1] - x.shape[1], seen.shape[1]):
        latest_first_BjD = seen[:, max(t + 1 - L, 0) : t + 1].flip(1)
        outputs.append((latest_first_BjD * k.T[: latest_first_BjD.shape[1]]).sum(1))
    y = torch.stack(outputs, dim=1)
    if skip is not None:
        y = y + skip.to(dtype) * x
    if gate is not None:
        y = y * gate.to(dtype)
    return (y.mT if time_last else y).to(u.dtype)
