"""`delta_rule` without a decay or with one per step: the custom ops around `scalar_kernels`. The batch comes first.

`given` is q, k and v, or all in one tensor (B, T, H (2 K + V)), as a linear layer makes them. With an eps q and k are
normalised by the kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.delta_rule import scalar_kernels, split_heads, walks
from zoo.kernels.launch import Config, configured, empty_like, fold_batch, padded, precision, rows


@torch.library.custom_op("zoo::delta_rule", mutates_args=())
def forward(
    given: list[Tensor],
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    key_dim: int,
    eps: float | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, and what the gradients need: w, the states before the chunks, and `walks.Chunks`. Without
    return_state or keep these have no elements."""
    q, k, v = (rows(x) for x in heads(given, beta, key_dim))
    B, T, H, K = q.shape
    V = v.shape[-1]
    chunks = _chunks(q, v, decay, eps)
    C = chunks.squares.shape[-1]
    U = q.new_empty(B, H, T, V)
    g = beta if decay is None else decay
    config = configured("delta_rule.prepare", prepare_config, q, v)
    scalar_kernels.prepare_kernel[(B * H * triton.cdiv(T, C),)](
        q, k, v, beta, g, chunks.W, U, *chunks[1:], T, H, eps or 0.0,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(), *g.stride(),
        K=K, V=V, BLOCK_K=padded(K), BLOCK_V=padded(V), C=C, HALVINGS=C.bit_length() - 1, DECAYS=decay is not None,
        UNIT=eps is not None, PRECISION=precision(q), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    o, last, w, states = walks.forward(
        "delta_rule", q, k, None, v, U, chunks, initial_state, decays=decay is not None, channels=False, bounded=False,
        return_state=return_state, keep=keep,
    )  # fmt: skip
    return o, last, w, states, *(chunks if keep else (q.new_empty(B, 0) for _ in chunks))


@forward.register_fake
def _(
    given: list[Tensor],
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    key_dim: int,
    eps: float | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, _, v = heads(given, beta, key_dim)
    chunks = _chunks(q, v, decay, eps)
    results = walks.results(q, v, chunks.squares.shape[-1], return_state, keep)
    return *results, *(chunks if keep else (q.new_empty(q.shape[0], 0) for _ in chunks))


@torch.library.custom_op("zoo::delta_rule_backward", mutates_args=())
def backward(
    given: list[Tensor],
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    w: Tensor,
    states: Tensor,
    W: Tensor,
    squares: Tensor,
    reads: Tensor,
    writes: Tensor,
    totals: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    key_dim: int,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `given`, three, then of beta, decay and S_0; of what there is not, without elements."""
    q, k, v = (rows(x) for x in heads(given, beta, key_dim))
    do = rows(do)
    B, T, H, K = q.shape
    V = v.shape[-1]
    C = squares.shape[-1]
    slopes = [empty_like(x, x) for x in given]
    dq, dk, dv = heads(slopes, beta, key_dim)
    dfirst = empty_like(initial_state, q)
    chunks = walks.Chunks(W, squares, reads, writes, totals)
    dstates = walks.backward(
        "delta_rule", q, k, chunks, do, dlast, dv, dfirst, decays=decay is not None, channels=False, bounded=False
    )
    dbeta, dg = empty_like(beta, q), empty_like(decay, q)
    g = beta if decay is None else decay
    config = configured("delta_rule.chunks_backward", gradient_config, q, do)
    scalar_kernels.gradient_kernel[(B * H * triton.cdiv(T, C),)](
        q, k, beta, g, w, states, dstates, do, dv, dq, dk, dbeta, dg, T, H, eps or 0.0,
        *q.stride()[:3], *k.stride()[:3], *beta.stride(), *g.stride(), *do.stride()[:3], *dv.stride()[:3],
        *dq.stride()[:3], *dk.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), PADDED_V=padded(V), BLOCK=min(config.block, padded(V)), C=C,
        DECAYS=decay is not None, UNIT=eps is not None, PRECISION=precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    slopes += [empty_like(None, q) for _ in range(3 - len(slopes))]
    return (*slopes, dbeta, dg, dfirst)  # type: ignore[return-value]


@backward.register_fake
def _(
    given: list[Tensor],
    beta: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    w: Tensor,
    states: Tensor,
    W: Tensor,
    squares: Tensor,
    reads: Tensor,
    writes: Tensor,
    totals: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    key_dim: int,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = (*given, *[None] * (3 - len(given)), beta, decay, initial_state)
    return tuple(empty_like(x, given[0]) for x in wanted)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, beta, decay, initial_state, *ctx.options, ctx.return_state, keep = inputs
    assert keep, "no gradients without what they need"
    ctx.count = len(given)
    ctx.save_for_backward(*given, beta, decay, initial_state, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    given, saved = list(ctx.saved_tensors[: ctx.count]), ctx.saved_tensors[ctx.count :]
    # w (B, H, T, V) has the size of o.
    do = torch.zeros_like(saved[3].transpose(1, 2)) if do is None else do
    gradients = torch.ops.zoo.delta_rule_backward(given, *saved, do, dlast if ctx.return_state else None, *ctx.options)
    wanted = zip(gradients[3:], ctx.needs_input_grad[1:], strict=False)
    others = (gradient if needed else None for gradient, needed in wanted)
    return (list(gradients[: ctx.count]), *others, None, None, None, None)


forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(forward)
fold_batch(backward)


def prepare_config(q: Tensor, v: Tensor) -> Config:
    """For one program per chunk, whose lengths are those of the walks."""
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    return Config(chunk=0, block=0, num_warps=max(1, widest // 64), num_stages=1)


def gradient_config(q: Tensor, v: Tensor) -> Config:
    """Few warps, which wait for each other at every product and sum, even where registers do not suffice."""
    K, V = padded(q.shape[-1]), padded(v.shape[-1])
    if K > 64:
        return Config(chunk=0, block=min(V, 64), num_warps=K // 32, num_stages=1)
    return Config(chunk=0, block=32, num_warps=2, num_stages=2)


def heads(given: list[Tensor], beta: Tensor, key_dim: int) -> list[Tensor]:
    """q, k and v (B, T, H, ...), or the like of their gradients."""
    return given if len(given) > 1 else split_heads(given[0], beta.shape[2], key_dim)


def _chunks(q: Tensor, v: Tensor, decay: Tensor | None, eps: float | None) -> walks.Chunks:
    B, T, H, K = q.shape
    C = walks.length("delta_rule", q, v)
    count = triton.cdiv(T, C)
    return walks.Chunks(
        W=q.new_empty(B, H, T, K),
        squares=q.new_empty(B, H, count, 2, C, C),
        reads=q.new_empty(B, 0 if decay is None and eps is None else H, T, dtype=torch.float32),
        writes=q.new_empty(B, H, T, dtype=torch.float32),
        totals=q.new_empty(B, 0 if decay is None else H, count, dtype=torch.float32),
    )
