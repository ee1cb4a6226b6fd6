"""torch's fused attention; with a window, block by block, so that the cost is linear in the length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Queries in a block: at least the window, and enough to keep the matrix products efficient.
MIN_BLOCK = 64
# Up to this many blocks, one masked problem is as fast as cutting it up.
DENSE_BLOCKS = 4


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    if window is None:
        return _dense(q, k, v, None, scale)
    Tq = q.shape[1]
    past = min(k.shape[1] - Tq, window - 1)
    k, v = (x[:, x.shape[1] - Tq - past :] for x in (k, v))
    block = max(window, MIN_BLOCK)
    if Tq <= DENSE_BLOCKS * block:
        return _dense(q, k, v, window, scale)
    first = _dense(q[:, :block], k[:, : past + block], v[:, : past + block], window, scale)
    # Every later block sees the window - 1 keys before it, so all of them are one batch of equal problems.
    q, k, v = (_blocks(x, block) for x in (q, k[:, past:], v[:, past:]))
    k, v = (torch.cat([x[:, :-1, block - window + 1 :], x[:, 1:]], dim=2) for x in (k, v))
    later = _dense(q[:, 1:].flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), window, scale)
    return torch.cat([first, later.unflatten(0, (len(q), -1)).flatten(1, 2)], dim=1)[:, :Tq]


def attention_at(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, window: int | None, scale: float) -> Tensor:
    query, key = positions[:, None, :, None], torch.arange(k.shape[1], device=k.device)
    mask = key <= query if window is None else (key <= query) & (key > query - window)
    return _masked(q, k, v, mask, False, scale)


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B, T, H, K) -> (B, blocks, block, H, K), with zeros after the end."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block))


def _dense(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Every query against every key, (B, T, H, K) as in the API; the queries stand at the last positions."""
    Tq, Tk = q.shape[1], k.shape[1]
    everything = window is None or window >= Tk
    causal = everything and Tq == Tk
    mask = None
    if not causal and not (everything and Tq == 1):
        position = torch.arange(Tk, device=q.device)
        ahead = position - position[Tk - Tq :, None]
        mask = ahead <= 0
        if window is not None:
            mask &= ahead > -window
    return _masked(q, k, v, mask, causal, scale)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)
