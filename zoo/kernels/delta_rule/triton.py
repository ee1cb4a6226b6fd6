"""The fused delta rules. Kernels are chosen by the decay: `channel` where each channel has its own, else `scalar`."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.delta_rule import channel, scalar
from zoo.kernels.launch import check_launch

LARGEST_HEAD = 256


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
    dtype = _check("delta_rule", q, k, v)
    S = None if initial_state is None else initial_state.float()
    q, k, values, keep = q.to(dtype), k.to(dtype), v.to(dtype), torch.is_grad_enabled()
    if decay is not None and decay.dim() == 4:
        o, S, *_ = channel.forward(q, k, values, None, None, beta, decay, S, min_decay, return_state, keep)
    else:
        o, S, *_ = scalar.forward([q, k, values], beta, decay, S, q.shape[-1], None, return_state, keep)
    return o.to(v.dtype), S if return_state else None


def packed_delta_rule(
    qkv: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    key_dim: int,
    eps: float,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    q, k, v = scalar.heads([qkv], beta, key_dim)
    _check("packed_delta_rule", q, k, v)
    S = None if initial_state is None else initial_state.float()
    o, S, *_ = scalar.forward([qkv], beta, decay, S, key_dim, eps, return_state, torch.is_grad_enabled())
    return o, S if return_state else None


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
    dtype = _check("generalized_delta_rule", q, k, v, a, b)
    if decay is None:
        decay, min_decay = q.new_zeros(1, dtype=torch.float32), 0.0
    elif decay.dim() == 3:
        decay = decay[..., None]
    S = None if initial_state is None else initial_state.float()
    tensors = (x.to(dtype) for x in (q, k, v, a, b))
    keep = torch.is_grad_enabled()
    o, S, *_ = channel.forward(*tensors, None, decay.expand(q.shape), S, min_decay, return_state, keep)
    return o.to(v.dtype), S if return_state else None


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> torch.dtype:
    dtype = check_launch(op, q, k, v, *others)
    K, V = q.shape[-1], v.shape[-1]
    if max(K, V) > LARGEST_HEAD:
        raise UnsupportedError(
            f"{op}: heads of {K} and {V} channels; the Triton backend has up to {LARGEST_HEAD}. Use more heads or pass "
            "impl='chunked'."
        )
    return dtype
