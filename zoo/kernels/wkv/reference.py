"""o_t = (e^p a + e^{u + k_t} v_t) / (e^p b + e^{u + k_t}), then a, b and p take in the token, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype
from zoo.kernels.wkv import empty_state


def wkv(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, initial_state: tuple[Tensor, ...] | None, return_state: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    dtype = state_dtype(v.dtype)
    g, u = decay.to(dtype), bonus.to(dtype)
    a, b, p = (x.to(dtype) for x in initial_state or empty_state(v[:, 0], len(v)))
    outputs = []
    for k_t, v_t in zip(k.to(dtype).unbind(1), v.to(dtype).unbind(1), strict=True):
        q = torch.maximum(p, u + k_t)
        past, now = torch.exp(p - q), torch.exp(u + k_t - q)
        outputs.append((past * a + now * v_t) / (past * b + now))
        q = torch.maximum(p + g, k_t)
        # p - q first: then the exponent has what rounding p + g has cost.
        past, now = torch.exp(p - q + g), torch.exp(k_t - q)
        a, b, p = past * a + now * v_t, past * b + now, q
    return torch.stack(outputs, dim=1).to(v.dtype), (a, b, p) if return_state else None
