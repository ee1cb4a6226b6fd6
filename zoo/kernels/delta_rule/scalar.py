"""`delta_rule` without a decay or with one per step: the custom ops around `scalar_kernels`. The batch comes first."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.delta_rule import scalar_kernels, walks
from zoo.kernels.launch import Config, configured, empty_like, fold_batch, padded, precision, rows


@torch.library.custom_op("zoo::delta_rule", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, and what the gradients need: w, the states before the chunks, and `walks.Chunks`. Without
    return_state or keep these have no elements."""
    q, k, v = rows(q), rows(k), rows(v)
    B, T, H, K = q.shape
    V = v.shape[-1]
    chunks = _chunks(q, v, decay)
    C = chunks.squares.shape[-1]
    U = q.new_empty(B, H, T, V)
    g = beta if decay is None else decay
    config = configured("delta_rule.prepare", prepare_config, q, v)
    scalar_kernels.prepare_kernel[(B * H * triton.cdiv(T, C),)](
        q, k, v, beta, g, chunks.W, U, *chunks[1:], T, H,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(), *g.stride(),
        K=K, V=V, BLOCK_K=padded(K), BLOCK_V=padded(V), C=C, HALVINGS=C.bit_length() - 1, DECAYS=decay is not None,
        PRECISION=precision(q), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    o, last, w, states = walks.forward(
        "delta_rule", q, k, None, v, U, chunks, initial_state, decays=decay is not None, channels=False, bounded=False,
        return_state=return_state, keep=keep,
    )  # fmt: skip
    return o, last, w, states, *(chunks if keep else (q.new_empty(B, 0) for _ in chunks))


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks = _chunks(q, v, decay)
    results = walks.results(q, v, chunks.squares.shape[-1], return_state, keep)
    return *results, *(chunks if keep else (q.new_empty(q.shape[0], 0) for _ in chunks))


@torch.library.custom_op("zoo::delta_rule_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    w: Tensor,
    states: Tensor,
    W: Tensor,
    squares: Tensor,
    since: Tensor,
    writes: Tensor,
    totals: Tensor,
    do: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbeta, ddecay and dS_0; the last two without elements if there is none."""
    q, k, do = rows(q), rows(k), rows(do)
    B, T, H, K = q.shape
    V = do.shape[-1]
    C = squares.shape[-1]
    dv, dfirst = empty_like(do, q), empty_like(initial_state, q)
    chunks = walks.Chunks(W, squares, since, writes, totals)
    dstates = walks.backward(
        "delta_rule", q, k, chunks, do, dlast, dv, dfirst, decays=decay is not None, channels=False, bounded=False
    )
    dq, dk, dbeta, dg = (empty_like(x, q) for x in (q, k, beta, decay))
    g = beta if decay is None else decay
    config = configured("delta_rule.chunks_backward", gradient_config, q, do)
    scalar_kernels.gradient_kernel[(B * H * triton.cdiv(T, C),)](
        q, k, beta, g, w, since, totals, states, dstates, do, dv, dq, dk, dbeta, dg, T, H,
        *q.stride()[:3], *k.stride()[:3], *beta.stride(), *g.stride(), *do.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), PADDED_V=padded(V), BLOCK=min(config.block, padded(V)), C=C,
        DECAYS=decay is not None, PRECISION=precision(q), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, dk, dv, dbeta, dg, dfirst


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    w: Tensor,
    states: Tensor,
    W: Tensor,
    squares: Tensor,
    since: Tensor,
    writes: Tensor,
    totals: Tensor,
    do: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(empty_like(x, q) for x in (q, k, do, beta, decay, initial_state))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, beta, decay, initial_state, ctx.return_state, keep = inputs
    assert keep, "no gradients without what they need"
    ctx.save_for_backward(q, k, beta, decay, initial_state, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, beta, decay, initial_state, w, *saved = ctx.saved_tensors
    # w (B, H, T, V) has the size of o.
    do = torch.zeros_like(w.transpose(1, 2)) if do is None else do
    gradients = torch.ops.zoo.delta_rule_backward(
        q, k, beta, decay, initial_state, w, *saved, do, dlast if ctx.return_state else None
    )
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None)


forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(forward)
fold_batch(backward)


def prepare_config(q: Tensor, v: Tensor) -> Config:
    """For one program per chunk, whose lengths are those of the walks."""
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    return Config(chunk=0, block=0, num_warps=max(1, widest // 64), num_stages=1)


def gradient_config(q: Tensor, v: Tensor) -> Config:
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    return Config(chunk=0, block=min(padded(v.shape[-1]), 64), num_warps=max(2, widest // 32), num_stages=1)


def _chunks(q: Tensor, v: Tensor, decay: Tensor | None) -> walks.Chunks:
    B, T, H, K = q.shape
    C = walks.length("delta_rule", q, v)
    count = triton.cdiv(T, C)
    return walks.Chunks(
        W=q.new_empty(B, H, T, K),
        squares=q.new_empty(B, H, count, 2, C, C),
        since=q.new_empty(B, 0 if decay is None else H, T, dtype=torch.float32),
        writes=q.new_empty(B, H, T, dtype=torch.float32),
        totals=q.new_empty(B, 0 if decay is None else H, count, dtype=torch.float32),
    )
