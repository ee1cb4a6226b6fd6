"""The recurrences, one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    min_decay: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """S = (I - beta k k^T) diag(e^g) S + beta k v^T; o = S^T q. See `zoo.kernels.delta_rule`."""
    dtype, state = v.dtype, state_dtype(v.dtype)
    q, k, v, beta = (x.to(state) for x in (q, k, v, beta))
    alpha = _alpha(decay, q)
    S = _start(k, v, initial_state)
    outputs = []
    for t in range(q.shape[1]):
        S = alpha[:, t, :, :, None] * S
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], v[:, t] - held)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, dim=1).to(dtype), S if return_state else None


def generalized_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None = None,
    *,
    min_decay: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """S = diag(e^g) S + b (a^T S) + k v^T; o = S^T q. See `zoo.kernels.delta_rule`."""
    dtype, state = v.dtype, state_dtype(v.dtype)
    q, k, v, a, b = (x.to(state) for x in (q, k, v, a, b))
    alpha = _alpha(decay, q)
    S = _start(k, v, initial_state)
    outputs = []
    for t in range(q.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        write = torch.einsum("bhk,bhv->bhkv", b[:, t], read) + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        S = alpha[:, t, :, :, None] * S + write
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, dim=1).to(dtype), S if return_state else None


def _alpha(decay: Tensor | None, q: Tensor) -> Tensor:
    """The decay factors e^g as (B, T, H, K or 1)."""
    if decay is None:
        return q.new_ones(*q.shape[:3], 1)
    return (decay if decay.dim() == 4 else decay.unsqueeze(-1)).to(q.dtype).exp()


def _start(k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(k.dtype)
    return k.new_zeros(k.shape[0], *k.shape[2:], v.shape[3])
