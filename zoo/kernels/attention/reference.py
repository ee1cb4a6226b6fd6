"""The definition: every score, one explicit mask, one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v. See `zoo.kernels.attention`."""
    dtype, accumulate = v.dtype, state_dtype(v.dtype)
    Tq, Tk = q.shape[1], k.shape[1]
    q, k, v = (x.to(accumulate) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    query = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
    key = torch.arange(Tk, device=q.device)
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    scores = scale * torch.einsum("bqhk,bshk->bhqs", q, k)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqs,bshv->bqhv", weights, v).to(dtype)
