"""The definition: every score, one explicit mask, one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    """The queries at the last positions. See `zoo.kernels.attention`."""
    Tq, Tk = q.shape[1], k.shape[1]
    return attention_at(q, k, v, torch.arange(Tk - Tq, Tk, device=q.device)[None], window=window, scale=scale)


def attention_at(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, window: int | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v."""
    dtype, accumulate = v.dtype, state_dtype(v.dtype)
    Tk = k.shape[1]
    q, k, v = (x.to(accumulate) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = scale * torch.einsum("bqhk,bshk->bhqs", q, k)
    weights = scores.masked_fill(~visible(positions, Tk, window), float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqs,bshv->bqhv", weights, v).to(dtype)


def visible(positions: Tensor, keys: int, window: int | None) -> Tensor:
    """Which of `keys` keys the queries at positions (B, Tq) see: (B, 1, Tq, keys)."""
    query, key = positions[:, None, :, None], torch.arange(keys, device=positions.device)
    return key <= query if window is None else (key <= query) & (key > query - window)
