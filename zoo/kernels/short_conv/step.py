"""One token of a decode in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.backend import check_step, state_dtype


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    cache = check_step("short_conv", x.shape[1], initial_state)
    dtype = state_dtype(x.dtype)
    window_BWD = torch.cat([cache.to(x.dtype), x], dim=1)
    y = (window_BWD.to(dtype) * weight.T.to(dtype)).sum(1, keepdim=True)
    if bias is not None:
        y = y + bias.to(dtype)
    y = (F.silu(y) if activation == "silu" else y).to(x.dtype)
    return y if gate is None else gate * y, window_BWD[:, 1:].contiguous()
