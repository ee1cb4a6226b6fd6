"""y_t = gate_t * act(bias + sum_j weight[:, W-1-j] * x_{t-j}), one step after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.backend import state_dtype


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    B, T, D = x.shape
    W = weight.shape[1]
    dtype = state_dtype(x.dtype)
    cache = x.new_zeros(B, W - 1, D) if initial_state is None else initial_state.to(x.dtype)
    outputs = []
    for t in range(T):
        window_BWD = torch.cat([cache, x[:, t : t + 1]], dim=1)
        y_BD = (window_BWD.to(dtype) * weight.T.to(dtype)).sum(1)
        if bias is not None:
            y_BD = y_BD + bias.to(dtype)
        outputs.append(F.silu(y_BD) if activation == "silu" else y_BD)
        cache = window_BWD[:, 1:]
    y = torch.stack(outputs, dim=1)
    if gate is not None:
        y = gate.to(dtype) * y
    return y.to(x.dtype), cache if return_state else None
