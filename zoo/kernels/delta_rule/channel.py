"""`generalized_delta_rule`, and `delta_rule` where each channel decays: the custom ops around `channel_kernels`. The
batch comes first."""

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
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    decay: Tensor,
    initial_state: Tensor | None,
    min_decay: float | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, and what the gradients need: u, the states before the chunks, the decayed q, b and k, and W,
    squares, since and totals. Without return_state or keep these have no elements. Instead of a and b
    beta makes it the delta rule."""
    delta = beta is not None
    q, k, v, a, b, beta, strides = _given(q, k, v, a, b, beta)
    B, T, H, K = q.shape
    V = v.shape[-1]
    decayed, *memory = _memory(q, v, min_decay)
    W, squares, since, totals = memory
    chunks = _chunks(W, squares, totals)
    C = squares.shape[-1]
    bounded = _bounded(q, min_decay, C)
    U = q.new_empty(B, H, T, V)
    config = configured("generalized_delta_rule.prepare", prepare_config, q, v)
    channel_kernels.prepare_kernel[(B * H * triton.cdiv(T, C),)](
        q, k, v, a, b, beta, decay, decayed, since, W, U, squares, totals, T, H,
        *strides, *decay.stride(),
        K=K, V=V, BLOCK_K=min(config.block, padded(K)), BLOCK_V=min(config.block, padded(V)), C=C,
        HALVINGS=C.bit_length() - 1, BOUNDED=bounded, DELTA=delta, PRECISION=precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    results = walks.forward(
        "generalized_delta_rule", *_walked(decayed), v, U, chunks, initial_state, decays=True, channels=True,
        bounded=bounded, return_state=return_state, keep=keep,
    )  # fmt: skip
    return *results, *((decayed, *memory) if keep else (q.new_empty(B, 0) for _ in range(5)))


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    decay: Tensor,
    initial_state: Tensor | None,
    min_decay: float | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    memory = _memory(q, v, min_decay)
    results = walks.results(q, v, memory[2].shape[-1], return_state, keep)
    return *results, *(memory if keep else (q.new_empty(q.shape[0], 0) for _ in memory))


@torch.library.custom_op("zoo::generalized_delta_rule_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    decay: Tensor,
    initial_state: Tensor | None,
    u: Tensor,
    states: Tensor,
    decayed: Tensor,
    W: Tensor,
    squares: Tensor,
    since: Tensor,
    totals: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    min_decay: float | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, da, db, dbeta, ddecay and dS_0; an unwanted ddecay and those of what is not given have no
    elements."""
    do = rows(do)
    delta = beta is not None
    dq, dk, dv, da, db, dbeta = (empty_like(x, q) for x in (q, k, v, a, b, beta))
    q, k, v, a, b, beta, strides = _given(q, k, v, a, b, beta)
    B, T, H, K = q.shape
    V = v.shape[-1]
    C = squares.shape[-1]
    bounded = _bounded(q, min_decay, C)
    dfirst = empty_like(initial_state, q)
    dr = torch.empty_like(u)
    read, written, _ = _walked(decayed)
    chunks = _chunks(W, squares, totals)
    dstates = walks.backward(
        "generalized_delta_rule", read, written, chunks, do, dlast, dr.transpose(1, 2), dfirst,
        decays=True, channels=True, bounded=bounded,
    )  # fmt: skip
    dg = empty_like(decay if decay_gradient else None, q)
    config = configured("generalized_delta_rule.chunks_backward", gradient_config, q, v)
    channel_kernels.gradient_kernel[(B * H * triton.cdiv(T, C),)](
        q, k, v, a, b, beta, decay, decayed, since, totals, u, squares, states, dstates, do, dr,
        dq, dk, dv, da, db, dbeta, dg, T, H, *strides, *decay.stride(), *do.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), PADDED_V=padded(V), BLOCK=min(config.block, padded(V)), C=C,
        HALVINGS=C.bit_length() - 1, BOUNDED=bounded, DELTA=delta,
        DECAY_GRADIENT=decay_gradient, PRECISION=precision(q), num_warps=config.num_warps, num_stages=config.num_stages,
        # Three programs on a multiprocessor, not two: while one waits, another works.
        maxnreg=168 if padded(K) <= 64 and q.element_size() == 2 else None,
    )  # fmt: skip
    return dq, dk, dv, da, db, dbeta, dg, dfirst


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    decay: Tensor,
    initial_state: Tensor | None,
    u: Tensor,
    states: Tensor,
    decayed: Tensor,
    W: Tensor,
    squares: Tensor,
    since: Tensor,
    totals: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    min_decay: float | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = (q, k, v, a, b, beta, decay if decay_gradient else None, initial_state)
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
        *saved, do, dlast if ctx.return_state else None, ctx.min_decay, ctx.needs_input_grad[6]
    )
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None, None)


forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(forward)
fold_batch(backward)


def _given(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[int]]:
    """As the kernels take them, q in place of what there is not, and their strides."""
    q, k, v = rows(q), rows(k), rows(v)
    a, b, beta = (q if a is None else rows(a)), (q if b is None else rows(b)), (q if beta is None else beta)
    return q, k, v, a, b, beta, [stride for x in (q, k, v, a, b, beta) for stride in x.stride()[:3]]


def prepare_config(q: Tensor, v: Tensor) -> Config:
    """For one program per chunk, whose lengths are those of the walks. Wide heads in fp32 do not fit its registers at
    once."""
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if q.dtype == torch.float32 and widest > 64:
        return Config(chunk=0, block=32, num_warps=1, num_stages=1)
    return Config(chunk=0, block=widest, num_warps=max(2, widest // 32), num_stages=1)


def gradient_config(q: Tensor, v: Tensor) -> Config:
    """All of v at once, where registers suffice."""
    V, widest = padded(v.shape[-1]), max(padded(q.shape[-1]), padded(v.shape[-1]))
    if widest <= 64:
        return Config(chunk=0, block=V, num_warps=4, num_stages=1)
    block = 128 if widest == 128 and q.element_size() == 2 else 32
    return Config(chunk=0, block=min(V, block), num_warps=8, num_stages=1)


def _bounded(q: Tensor, min_decay: float | None, C: int) -> bool:
    """Whether no decay to the middle of a chunk is too far from 1."""
    return min_decay is not None and -min_decay * C / 2 <= _LARGEST_SUM[q.dtype]


def _memory(q: Tensor, v: Tensor, min_decay: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The decayed q, b and k; W, squares, since and totals."""
    B, T, H, K = q.shape
    # Without a bound the work on a chunk grows faster than its length.
    C = walks.length("generalized_delta_rule", q, v, longest=64 if _bounded(q, min_decay, 32) else 16)
    count = triton.cdiv(T, C)
    bounded = _bounded(q, min_decay, C)
    return (
        q.new_empty(B, H, 4 if bounded else 3, T, K),
        q.new_empty(B, H, T, K),
        q.new_empty(B, H, count, 4, C, C),
        q.new_empty((B, H, T, K) if bounded else (B, 0), dtype=torch.float32),
        q.new_empty(B, H, count, 2 if bounded else 1, K, dtype=torch.float32),
    )


def _chunks(W: Tensor, squares: Tensor, totals: Tensor) -> walks.Chunks:
    return walks.Chunks(W=W, squares=squares, reads=totals[:0], writes=totals[:0], totals=totals)


def _walked(decayed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decayed q, b and k as (B, T, H, K)."""
    q, b, k = decayed[:, :, :3].permute(2, 0, 3, 1, 4).unbind(0)
    return q, b, k
