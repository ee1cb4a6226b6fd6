"""h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t; y_t = C_t . h_t + D x_t, one step after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.backend import state_dtype


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, T, channels = x.shape
    dtype = state_dtype(x.dtype)
    u, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = F.softplus(dt + dt_bias.to(dtype))
    h = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        dt_t = dt[:, t, :, None] if dt.dim() == 3 else dt[:, None]
        B_t, C_t = (M[:, t, None] if M.dim() == 3 else M for M in (B, C))
        h = torch.exp(dt_t * A) * h + dt_t * B_t * u[:, t, :, None]
        outputs.append((C_t * h).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), h if return_state else None
