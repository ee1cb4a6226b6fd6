"""One token of a decode in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.backend import check_step, state_dtype


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
) -> tuple[Tensor, Tensor]:
    h = check_step("selective_scan", x.shape[1], initial_state)
    dtype = state_dtype(x.dtype)
    u = x[:, 0].to(dtype)
    if dt_bias is not None:
        dt = F.softplus(dt.to(dtype) + dt_bias.to(dtype))
    dt_D1 = (dt[:, 0] if dt.dim() == 3 else dt).to(dtype)[..., None]
    B, C = (M.to(dtype) for M in (B, C))
    h = torch.exp(dt_D1 * A.to(dtype)) * h.to(dtype) + dt_D1 * B * u[..., None]
    y = (h @ C.mT).squeeze(-1) if C.dim() == 3 else (h * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z[:, 0].to(dtype))
    return y[:, None].to(x.dtype), h
