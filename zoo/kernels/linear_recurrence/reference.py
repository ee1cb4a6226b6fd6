"""The recurrence, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    B, T, H, K = q.shape
    out_dtype, dtype = v.dtype, state_dtype(v.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    g = q.new_zeros(1) if decay is None else decay.to(dtype)
    # (H,) -> (H, 1) and (B, T, H) -> (B, T, H, 1): one number for all channels of a head.
    kept = (g if g.dim() == 4 else g[..., None]).exp().expand(B, T, H, K)
    outputs = []
    for t in range(T):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        before, S = S, kept[:, t, :, :, None] * S + kv
        read = S if bonus is None else before + bonus.to(dtype)[:, :, None] * kv
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], read)
        outputs.append(o if skip is None else o + skip.to(dtype)[:, None] * v[:, t])
    return torch.stack(outputs, dim=1).to(out_dtype), S if return_state else None
