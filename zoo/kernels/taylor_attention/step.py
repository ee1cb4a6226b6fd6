"""One token of a decode in plain torch."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import check_step, state_dtype
from zoo.kernels.taylor_attention.features import taylor_features


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    S, z = (None, None) if initial_state is None else initial_state
    dtype = state_dtype(v.dtype)
    S, z = (check_step("taylor_attention", q.shape[1], x).to(dtype) for x in (S, z))
    phi_q, phi_k = taylor_features(q[:, 0].to(dtype)), taylor_features(k[:, 0].to(dtype))
    S = S + phi_k[..., None] * v[:, 0, :, None].to(dtype)
    z = z + phi_k
    o = (phi_q[..., None, :] @ S).squeeze(-2) / ((phi_q * z).sum(-1, keepdim=True) + eps)
    return o[:, None].to(v.dtype), (S, z)
