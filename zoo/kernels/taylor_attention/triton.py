"""Fused Taylor attention: all pairs of tokens of a chunk, and sums over features between chunks.

Every tensor of the custom ops has the batch as its first axis.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.launch import Config, check_launch, configured, empty_like, fold_batch, padded, precision, rows
from zoo.kernels.taylor_attention import quadratic_kernels, state_kernels
from zoo.kernels.taylor_attention.features import num_features

LARGEST_HEAD = 256
# With a state, whose second order has as many rows as pairs of channels.
LARGEST_STATE = 32
# Tokens of a chunk are a multiple of it: every kernel's block of them divides it. With 128 keys a program and states
# ptxas makes a `key_kernel` of illegal accesses, unless it is told not to optimise.
LARGEST_BLOCK = 64
# For a thread, by kernel and channels of a value: one more program has room on a multiprocessor then.
REGISTERS = {("forward", 128): 128, ("query_backward", 128): 168, ("key_backward", 64): 168}


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    dtype = check_launch("taylor_attention", q, k, v)
    K, V = q.shape[-1], v.shape[-1]
    stateful = initial_state is not None or return_state
    if max(K, V) > LARGEST_HEAD or (stateful and K > LARGEST_STATE):
        raise UnsupportedError(
            f"taylor_attention: K = {K}, V = {V}; the Triton backend has up to {LARGEST_HEAD} channels, and keeps a "
            f"state for up to {LARGEST_STATE} feature channels. Pass impl='chunked'."
        )
    S, z = (None, None) if initial_state is None else (x.float() for x in initial_state)
    o, _, S, z = torch.ops.zoo.taylor_attention(q.to(dtype), k.to(dtype), v.to(dtype), S, z, return_state, eps)
    return o.to(v.dtype), (S, z) if return_state else None


@torch.library.custom_op("zoo::taylor_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None, return_state: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, 1 / the normaliser (B, H, T), S and z; the last two without elements unless return_state."""
    B, T, H, K = q.shape
    q, k, v = rows(q), rows(k), rows(v)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    n = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    last = [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in _state_shapes(q, v, return_state)]
    L = chunk_length(T, K)
    sums = _sums(k, v, None, None, S, z, last[0], last[1], L)
    state = S is not None or T > L
    config = configured("taylor_attention.forward", forward_config, q, v, state)
    quadratic_kernels.forward_kernel[(B * H * triton.cdiv(T, config.chunk),)](
        q, k, v, o, n, *sums, T, H, L, K**-0.5, eps, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **_pair_options("forward", config, state, q, k, v),
    )  # fmt: skip
    return o, n, last[0], last[1]


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None, return_state: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last = [q.new_empty(shape, dtype=torch.float32) for shape in _state_shapes(q, v, return_state)]
    return v.new_empty(v.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32), last[0], last[1]


@torch.library.custom_op("zoo::taylor_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    o: Tensor,
    n: Tensor,
    do: Tensor,
    dS: Tensor | None,
    dz: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and dS and dz of the initial state; these two without elements if there is none."""
    B, T, H, K = q.shape
    q, k, v, do = rows(q), rows(k), rows(v), rows(do)
    dq, dk, dv, dS_first, dz_first = (empty_like(x, q) for x in (q, k, v, S, z))
    m = torch.empty_like(n)
    nothing = q.new_empty(0)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    L = chunk_length(T, K)
    sums = _sums(k, v, None, None, S, z, nothing, nothing, L)
    config = configured("taylor_attention.query_backward", backward_config, q, v)
    quadratic_kernels.query_kernel[(B * H * triton.cdiv(T, config.chunk),)](
        q, k, v, o, n, do, m, dq, *sums, T, H, L, K**-0.5, *strides,
        HAS_FIRST=S is not None, **_pair_options("query_backward", config, S is not None or T > L, q, k, v, do),
    )  # fmt: skip
    sums = _sums(q, do, n, m, dS, dz, dS_first, dz_first, L)
    config = configured("taylor_attention.key_backward", backward_config, q, v)
    quadratic_kernels.key_kernel[(B * H * triton.cdiv(T, config.chunk),)](
        q, k, v, n, do, m, dk, dv, *sums, T, H, L, K**-0.5, *strides,
        **_pair_options("key_backward", config, dS is not None or T > L, q, k, v, do),
    )  # fmt: skip
    return dq, dk, dv, dS_first, dz_first


def _sums(
    x: Tensor,
    y: Tensor,
    n: Tensor | None,
    m: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    S_last: Tensor,
    z_last: Tensor,
    L: int,
) -> tuple[Tensor, Tensor]:
    """S and z of `state_kernels.sum_kernel`, of which nothing is made that nobody asks for.

    n and m are for the way back. The walk starts with S and z and ends in S_last and z_last, if they have elements.
    """
    B, T, H, K = x.shape
    V = y.shape[-1]
    keep, has_last = S is not None or T > L, S_last.numel() > 0
    if not keep and not has_last:
        return x, x
    config = configured("taylor_attention.sums", sum_config, x, y)
    chunks, channels, block = triton.cdiv(T, L), padded(K), min(config.block, padded(V))
    rows_of, wide = sum_rows(x), padded(K + 1)
    groups = triton.cdiv(K, rows_of)
    sums = (
        x.new_empty((B, H, chunks, channels * channels + wide, V) if keep else (0,)),
        x.new_empty((B, H, chunks, wide, wide) if keep else (0,), dtype=torch.float32),
    )
    back = (x, x) if n is None or m is None else (n, m)
    first = (x, x) if S is None or z is None else (S.contiguous(), z.contiguous())
    state_kernels.sum_kernel[(B * H * (groups + 1) * triton.cdiv(V, block),)](
        x, y, *back, *sums, *first, S_last, z_last, T, H, L, K**-0.5, *x.stride()[:3], *y.stride()[:3],
        K=K, V=V, F=num_features(K), BLOCK_K=channels, BLOCK=block, ROWS=rows_of, WIDE=wide, C=config.chunk,
        BACKWARD=n is not None, KEEP=keep, HAS_FIRST=S is not None, HAS_LAST=has_last, PRECISION=precision(x),
        UNIT=unit(x, y), num_warps=config.num_warps, num_stages=config.num_stages,
        # Three programs a multiprocessor; what is spilt for it is of the lower orders alone.
        maxnreg=168 if x.element_size() == 2 else None,
    )  # fmt: skip
    return sums


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    o: Tensor,
    n: Tensor,
    do: Tensor,
    dS: Tensor | None,
    dz: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(empty_like(x, q) for x in (q, k, v, S, z))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[0], output[1])
    ctx.return_state = inputs[5]
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, do: Tensor | None, dn: Tensor | None, dS: Tensor | None, dz: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, S, z, o, n = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    if not ctx.return_state or (dS is None and dz is None):
        dS = dz = None
    else:
        B, H, F, V = q.shape[0], q.shape[2], num_features(q.shape[3]), v.shape[3]
        dS = n.new_zeros(B, H, F, V) if dS is None else dS
        dz = n.new_zeros(B, H, F) if dz is None else dz
    gradients = torch.ops.zoo.taylor_attention_backward(q, k, v, S, z, o, n, do, dS, dz)
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def chunk_length(T: int, K: int) -> int:
    """Tokens of a chunk. All pairs cost a token T / 2 pairs, a state its features; where they meet is as measured."""
    if K > LARGEST_STATE or 160 * max(K, 16) - 512 > T:
        return triton.cdiv(T, LARGEST_BLOCK) * LARGEST_BLOCK
    return 16 * padded(K)


def sum_rows(x: Tensor) -> int:
    """Channels i of the pairs (i, j) that a program sums up."""
    return max(1, (128 if x.element_size() == 2 else 64) // padded(x.shape[-1]))


def state_rows(K: int) -> int:
    """Channels i of the pairs (i, j) whose rows of a state are read at a time; they divide `sum_rows`."""
    return max(1, 64 // padded(K))


def sum_config(x: Tensor, y: Tensor) -> Config:
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=1)
    return Config(chunk=64, block=64, num_warps=4, num_stages=3)


def forward_config(q: Tensor, v: Tensor, state: bool) -> Config:
    config = backward_config(q, v)
    if q.dtype == torch.float32:
        return config
    return config._replace(block=32 if padded(v.shape[-1]) == 128 and not state else config.block, num_stages=3)


def backward_config(q: Tensor, v: Tensor) -> Config:
    narrow, wide = (32, 16) if q.dtype == torch.float32 else (64, 32)
    C = narrow if max(q.shape[-1], v.shape[-1]) <= 128 else wide
    return Config(C, C, num_warps=4, num_stages=1)


def _pair_options(kernel: str, config: Config, state: bool, *tensors: Tensor) -> dict[str, Any]:
    """tensors: q, k, v and, backward, do."""
    q, v = tensors[0], tensors[2]
    K, V = q.shape[-1], v.shape[-1]
    assert LARGEST_BLOCK % config.chunk == config.chunk % config.block == 0, config
    few = not state and K <= LARGEST_STATE and q.element_size() == 2
    return {
        "K": K, "V": V, "BLOCK_K": padded(K), "BLOCK_V": padded(V), "C": config.chunk, "N": config.block,
        "ROWS": state_rows(K), "WIDE": padded(K + 1), "HAS_STATE": state, "UNIT": unit(*tensors),
        "PRECISION": precision(q), "num_warps": config.num_warps, "num_stages": config.num_stages,
        "maxnreg": REGISTERS.get((kernel, padded(V))) if few else None,
    }  # fmt: skip


def unit(*tensors: Tensor) -> int:
    """What divides all strides, up to the 16 bytes of a load; 1 where Triton sees by itself that 16 does."""
    common = math.gcd(16, *(stride for x in tensors for stride in x.stride()[:3]))
    return 1 if common == 16 else math.gcd(common, 16 // tensors[0].element_size())


def _state_shapes(q: Tensor, v: Tensor, return_state: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    B, _, H, K = q.shape
    F = num_features(K)
    return ((B, H, F, v.shape[-1]), (B, H, F)) if return_state else ((B, 0), (B, 0))
