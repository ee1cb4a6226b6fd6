"""Launches `walk_kernels`, for either delta rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from zoo.kernels.delta_rule import walk_kernels
from zoo.kernels.launch import Config, configured, padded, precision


class Chunks(NamedTuple):
    """What a walk reads of the chunks beside its q, b, k and v; what a rule has no use for has no elements."""

    W: Tensor
    squares: Tensor
    reads: Tensor
    writes: Tensor
    totals: Tensor


def config(q: Tensor, v: Tensor) -> Config:
    """A warp for every 16 columns of v, which need nothing of each other, or for every 64 of k; in fp32 more, so that
    registers suffice. With four warps and 64 columns come the products that Triton sometimes miscompiles."""
    K, V = padded(q.shape[-1]), padded(v.shape[-1])
    widest = max(K, V)
    if q.dtype == torch.float32:
        block = min(V, 32 if widest <= 64 else 16)
        return Config(chunk=16, block=block, num_warps=4 if widest > 64 else block // 16, num_stages=1)
    block = min(V, 32 if K <= 64 else 16)
    return Config(chunk=32, block=block, num_warps=max(block // 16, K // 64), num_stages=3 if K <= 64 else 2)


def length(name: str, q: Tensor, v: Tensor, longest: int = 64) -> int:
    """Of the chunks, in both walks and in what comes before and after them."""
    return min(configured(f"{name}.forward", config, q, v).chunk, longest, padded(q.shape[1]))


def forward(
    name: str,
    q: Tensor,
    b: Tensor,
    k: Tensor | None,
    v: Tensor,
    U: Tensor,
    chunks: Chunks,
    initial_state: Tensor | None,
    *,
    decays: bool,
    channels: bool,
    bounded: bool,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `results` allocates, filled."""
    B, T, H, V = v.shape
    K, C = q.shape[-1], chunks.squares.shape[-1]
    setting = configured(f"{name}.forward", config, q, v)
    block = min(setting.block, padded(V))
    o, last, u, states = results(q, v, C, return_state, keep)
    k = b if k is None else k
    walk_kernels.forward_kernel[(B * H * padded(V) // block,)](
        q, b, k, v, chunks.W, U, *chunks[1:], q if initial_state is None else initial_state.contiguous(), o, u, states,
        last, T, H, *q.stride()[:3], *b.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), PADDED_V=padded(V), BLOCK=block, C=C, CHANNELS=channels, BOUNDED=bounded,
        DECAYS=decays, SCALED=chunks.reads.numel() > 0, HAS_FIRST=initial_state is not None, HAS_LAST=return_state,
        KEEP=keep,
        PRECISION=precision(q), num_warps=setting.num_warps, num_stages=setting.num_stages,
    )  # fmt: skip
    return o, last, u, states


def backward(
    name: str,
    q: Tensor,
    b: Tensor,
    chunks: Chunks,
    do: Tensor,
    dlast: Tensor | None,
    dr: Tensor,
    dfirst: Tensor,
    *,
    decays: bool,
    channels: bool,
    bounded: bool,
) -> Tensor:
    """Fills dr (B, T, H, V), and dfirst if it has elements. Returns the gradients of the states after the chunks."""
    B, T, H, V = do.shape
    K, C = q.shape[-1], chunks.squares.shape[-1]
    setting = configured(f"{name}.backward", config, q, do)
    block = min(setting.block, padded(V))
    dstates = _states(q, do, C)
    walk_kernels.backward_kernel[(B * H * padded(V) // block,)](
        q, b, *chunks, do, q if dlast is None else dlast.contiguous(), dr, dstates, dfirst, T, H,
        *q.stride()[:3], *b.stride()[:3], *do.stride()[:3], *dr.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), PADDED_V=padded(V), BLOCK=block, C=C, CHANNELS=channels, BOUNDED=bounded,
        DECAYS=decays, SCALED=chunks.reads.numel() > 0, HAS_FIRST=dfirst.shape[1] > 0, HAS_LAST=dlast is not None,
        PRECISION=precision(q), num_warps=setting.num_warps, num_stages=setting.num_stages,
    )  # fmt: skip
    return dstates


def results(q: Tensor, v: Tensor, C: int, return_state: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for o, the last state, u and the states before the chunks."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    return (
        q.new_empty(B, T, H, V),
        q.new_empty((B, H, K, V) if return_state else (B, 0), dtype=torch.float32),
        q.new_empty((B, H, T, V) if keep else (B, 0)),
        _states(q, v, C) if keep else q.new_empty(B, 0),
    )


def _states(q: Tensor, v: Tensor, C: int) -> Tensor:
    B, T, H, K = q.shape
    return q.new_empty(B, H, triton.cdiv(T, C), padded(v.shape[-1]), padded(K))
