"""The fused recurrence. Kernels are chosen by the decay: `channel` where each channel has its own, else `scalar`."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.launch import check_launch
from zoo.kernels.linear_recurrence import channel, scalar

LARGEST_HEAD = 256


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
    dtype = check_launch("linear_recurrence", q, k, v)
    B, T, H, K = q.shape
    if max(K, v.shape[-1]) > LARGEST_HEAD:
        raise UnsupportedError(
            f"linear_recurrence: heads of {K} and {v.shape[-1]} channels; the Triton backend has up to {LARGEST_HEAD}. "
            "Use more heads or pass impl='chunked'."
        )
    qkv = (q.to(dtype), k.to(dtype), v.to(dtype))
    S = None if initial_state is None else initial_state.float()
    # The custom ops have the batch as the first axis of every tensor, so that vmap can fold its axis into it.
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(B, H)
    if bonus is None and (decay is None or decay.dim() < 4):
        through = None if skip is None else skip.expand(B, H)
        o, S, *_ = scalar.forward(*qkv, decay, through, S, return_state, torch.is_grad_enabled())
    else:
        if bonus is not None:
            bonus = bonus[None]
        if decay is None:
            decay = q.new_zeros(1, dtype=torch.float32).expand(B, T, H, K)
        elif decay.dim() < 4:
            decay = (decay[:, None] if decay.dim() == 2 else decay)[..., None].expand(B, T, H, K)
        o, S, *_ = channel.forward(*qkv, decay, bonus, S, return_state, torch.is_grad_enabled())
        if skip is not None:
            o = o + skip[:, None] * v
    return o.to(v.dtype), S if return_state else None
