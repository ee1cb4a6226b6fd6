"""`generalized_delta_rule`: the custom ops around `channel_kernels`. The batch comes first."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.delta_rule import channel_kernels, walks
from zoo.kernels.launch import Config, configured, empty_like, fold_batch, padded, precision, rows

# Over how large a sum of logarithms exp may be taken: bf16 and fp32 reach e^88, fp16 e^11 and, normal numbers, e^-9.
# In fp32 a sum must be as exact as the result.
_LARGEST_SUM = {torch.bfloat16: 40.0, torch.float16: 5.0, torch.float32: 10.0}


@torch.library.custom_op("zoo::generalized_delta_rule", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    min_decay: float | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, and what the gradients need: u, the states before the chunks, the decayed q, b and k, and W,
    squares and totals of `walks.Chunks`. Without return_state or keep these have no elements."""
    q, k, v, a, b = rows(q), rows(k), rows(v), rows(a), rows(b)
    B, T, H, K = q.shape
    V = v.shape[-1]
    decayed, *memory = _memory(q, v, min_decay)
    chunks = _chunks(q, *memory)
    C = chunks.squares.shape[-1]
    U = q.new_empty(B, H, T, V)
    config = configured("generalized_delta_rule.prepare", chunk_config, q, v)
    channel_kernels.prepare_kernel[(B * H * triton.cdiv(T, C),)](
        q, k, v, a, b, decay, decayed, chunks.W, U, chunks.squares, chunks.totals, T, H,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *a.stride()[:3], *b.stride()[:3], *decay.stride(),
        K=K, V=V, BLOCK_K=padded(K), BLOCK_V=padded(V), C=C, HALVINGS=C.bit_length() - 1,
        BOUNDED=_bounded(q, min_decay, C), PRECISION=precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    results = walks.forward(
        "generalized_delta_rule", *_walked(decayed), v, U, chunks, initial_state, decays=True, channels=True,
        return_state=return_state, keep=keep,
    )  # fmt: skip
    return *results, *((decayed, *memory) if keep else (q.new_empty(B, 0) for _ in range(4)))


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    min_decay: float | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    memory = _memory(q, v, min_decay)
    results = walks.results(q, v, memory[2].shape[-1], return_state, keep)
    return *results, *(memory if keep else (q.new_empty(q.shape[0], 0) for _ in memory))


@torch.library.custom_op("zoo::generalized_delta_rule_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    u: Tensor,
    states: Tensor,
    decayed: Tensor,
    W: Tensor,
    squares: Tensor,
    totals: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    min_decay: float | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, da, db, ddecay and dS_0; an unwanted ddecay and dS_0 without an S_0 have no elements."""
    q, k, v, a, b, do = rows(q), rows(k), rows(v), rows(a), rows(b), rows(do)
    B, T, H, K = q.shape
    V = v.shape[-1]
    C = squares.shape[-1]
    dfirst = empty_like(initial_state, q)
    dr = torch.empty_like(u)
    read, written, _ = _walked(decayed)
    dstates = walks.backward(
        "generalized_delta_rule", read, written, _chunks(q, W, squares, totals), do, dlast, dr.transpose(1, 2), dfirst,
        decays=True, channels=True,
    )  # fmt: skip
    dq, dk, dv, da, db = (empty_like(x, q) for x in (q, k, v, a, b))
    dg = empty_like(decay if decay_gradient else None, q)
    config = configured("generalized_delta_rule.chunks_backward", gradient_config, q, v)
    channel_kernels.gradient_kernel[(B * H * triton.cdiv(T, C),)](
        q, k, v, a, b, decay, u, squares, states, dstates, do, dr, dq, dk, dv, da, db, dg, T, H,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *a.stride()[:3], *b.stride()[:3], *decay.stride(),
        *do.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), BLOCK=min(config.block, padded(V)), C=C,
        HALVINGS=C.bit_length() - 1, BOUNDED=_bounded(q, min_decay, C), DECAY_GRADIENT=decay_gradient,
        PRECISION=precision(q), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, dk, dv, da, db, dg, dfirst


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    u: Tensor,
    states: Tensor,
    decayed: Tensor,
    W: Tensor,
    squares: Tensor,
    totals: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    min_decay: float | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = (q, k, v, a, b, decay if decay_gradient else None, initial_state)
    return tuple(empty_like(x, q) for x in wanted)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.min_decay, ctx.return_state, keep = inputs
    assert keep, "no gradients without what they need"
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    do = torch.zeros_like(saved[2]) if do is None else do
    gradients = torch.ops.zoo.generalized_delta_rule_backward(
        *saved, do, dlast if ctx.return_state else None, ctx.min_decay, ctx.needs_input_grad[5]
    )
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None, None)


forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(forward)
fold_batch(backward)


def chunk_config(q: Tensor, v: Tensor) -> Config:
    """For the kernels of one program per chunk, whose lengths are those of the walks."""
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    return Config(chunk=0, block=0, num_warps=2 if widest <= 64 else 4, num_stages=1)


def gradient_config(q: Tensor, v: Tensor) -> Config:
    return Config(chunk=0, block=64 if padded(q.shape[-1]) <= 64 else 32, num_warps=4, num_stages=1)


def _bounded(q: Tensor, min_decay: float | None, C: int) -> bool:
    """Whether no decay to the middle of a chunk is too far from 1."""
    return min_decay is not None and -min_decay * C / 2 <= _LARGEST_SUM[q.dtype]


def _memory(q: Tensor, v: Tensor, min_decay: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decayed q, b and k; W, squares and totals."""
    B, T, H, K = q.shape
    # Without a bound the work on a chunk grows faster than its length.
    C = walks.length("generalized_delta_rule", q, v, longest=64 if _bounded(q, min_decay, 32) else 16)
    count = triton.cdiv(T, C)
    return (
        q.new_empty(B, H, 3, T, K),
        q.new_empty(B, H, T, K),
        q.new_empty(B, H, count, 4, C, C),
        q.new_empty(B, H, count, K, dtype=torch.float32),
    )


def _chunks(q: Tensor, W: Tensor, squares: Tensor, totals: Tensor) -> walks.Chunks:
    none = q.new_empty(0, dtype=torch.float32)
    return walks.Chunks(W=W, squares=squares, since=none, writes=none, totals=totals)


def _walked(decayed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decayed q, b and k as (B, T, H, K)."""
    q, b, k = decayed.transpose(2, 3).unbind(3)
    return q.transpose(1, 2), b.transpose(1, 2), k.transpose(1, 2)
