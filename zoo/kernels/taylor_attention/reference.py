"""The recurrence over phi's features, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype
from zoo.kernels.taylor_attention.features import taylor_features


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    out_dtype, dtype = v.dtype, state_dtype(v.dtype)
    phi_q, phi_k, v = taylor_features(q.to(dtype)), taylor_features(k.to(dtype)), v.to(dtype)
    B, T, H, F = phi_k.shape
    if initial_state is None:
        S, z = v.new_zeros(B, H, F, v.shape[-1]), v.new_zeros(B, H, F)
    else:
        S, z = (x.to(dtype) for x in initial_state)
    outputs = []
    for t in range(T):
        S = S + phi_k[:, t, :, :, None] * v[:, t, :, None, :]
        z = z + phi_k[:, t]
        numerator = torch.einsum("bhf,bhfv->bhv", phi_q[:, t], S)
        outputs.append(numerator / ((phi_q[:, t] * z).sum(-1, keepdim=True) + eps))
    return torch.stack(outputs, dim=1).to(out_dtype), (S, z) if return_state else None
