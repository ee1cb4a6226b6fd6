"""One token of a decode in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import check_step, state_dtype


def wkv(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, initial_state: tuple[Tensor, ...] | None, return_state: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    dtype = state_dtype(v.dtype)
    a, b, p = (check_step("wkv", k.shape[1], x).to(dtype) for x in initial_state or (None,) * 3)
    k_t, v_t, g = k[:, 0].to(dtype), v[:, 0].to(dtype), decay.to(dtype)
    now = bonus.to(dtype) + k_t
    q, top = torch.maximum(p, now), torch.maximum(p + g, k_t)
    past, now = torch.exp(p - q), torch.exp(now - q)
    o = (past * a + now * v_t) / (past * b + now)
    kept, added = torch.exp(p - top + g), torch.exp(k_t - top)
    return o[:, None].to(v.dtype), (kept * a + added * v_t, kept * b + added, top)
