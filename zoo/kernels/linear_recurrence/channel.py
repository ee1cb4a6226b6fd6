"""A decay per channel: the custom ops around `channel_kernels`. The batch is the first axis of every tensor."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, configured, empty_like, fold_batch, padded, precision, rows
from zoo.kernels.linear_recurrence import channel_kernels


@torch.library.custom_op("zoo::linear_recurrence_channels", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o and S_T; and for the backward pass q e^since, k e^until, scores, log2 whole decays and the chunks' states.

    decay (B, T, H, K); bonus (G, H, K), each for B / G sequences. Without return_state S_T has no elements, without
    `save` the states have none.
    """
    B, T, H, K = q.shape
    q, k, v = rows(q), rows(k), rows(v)
    config = configured("linear_recurrence.channel_prepare", prepare_config, q, v)
    C, chunks = config.chunk, triton.cdiv(T, config.chunk)
    u = q if bonus is None else rows(bonus)
    o, read, written, scores, whole, states, last = _results(q, v, C, return_state, save)
    channel_kernels.prepare_kernel[(B * H * chunks,)](
        q, k, decay, u, read, written, scores, whole, T, H, _group(bonus, q),
        *q.stride()[:3], *k.stride()[:3], *decay.stride(), *u.stride()[:2],
        K=K, BLOCK=min(config.block, padded(K)), C=C, HALVINGS=C.bit_length() - 3, BONUS=bonus is not None,
        PRECISION=precision(q), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    first = q if initial_state is None else initial_state.contiguous()
    config = configured("linear_recurrence.channel_forward", walk_config, q, v)
    _scan(config, C, False, read, written, v, scores, whole, first, o, states, last, initial_state is not None,
          return_state, save)  # fmt: skip
    return o, last, read, written, scores, whole, states


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    C = configured("linear_recurrence.channel_prepare", prepare_config, q, v).chunk
    o, read, written, scores, whole, states, last = _results(q, v, C, return_state, save)
    return o, last, read, written, scores, whole, states


@torch.library.custom_op("zoo::linear_recurrence_channels_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    read: Tensor,
    written: Tensor,
    scores: Tensor,
    whole: Tensor,
    states: Tensor,
    do: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, ddecay, dbonus and dS_0; the last two without elements if there is no bonus or initial state."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    q, k, v, do = rows(q), rows(k), rows(v), rows(do)
    C, chunks = scores.shape[-1], scores.shape[2]
    dq, dk, dv, dg, dfirst = (empty_like(x, q) for x in (q, k, v, decay, initial_state))
    D = torch.empty_like(states)
    config = configured("linear_recurrence.channel_carry_backward", walk_config, q, v)
    first = q if dlast is None else dlast.contiguous()
    _scan(config, C, True, written, read, do, scores, whole, first, dv, D, dfirst, dlast is not None,
          initial_state is not None, True)  # fmt: skip
    config = configured("linear_recurrence.channel_chunks_backward", chunks_backward_config, q, v, C)
    block = min(config.block, padded(K))
    u = q if bonus is None else rows(bonus)
    group = _group(bonus, q)
    du = torch.empty(B // group, H, group * chunks, K, dtype=torch.float32, device=q.device)
    channel_kernels.gradient_kernel[(B * H * chunks * triton.cdiv(K, block),)](
        q, k, v, decay, u, do, states, D, dq, dk, dg, du, T, H, group,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *decay.stride(), *u.stride()[:2], *do.stride()[:3],
        K=K, V=V, BLOCK=block, BLOCK_V=min(padded(V), 64), C=C,
        HALVINGS=C.bit_length() - 4, BONUS=bonus is not None, PRECISION=precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq, dk, dv, dg, empty_like(None, q) if bonus is None else du.sum(2).to(bonus.dtype), dfirst


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    read: Tensor,
    written: Tensor,
    scores: Tensor,
    whole: Tensor,
    states: Tensor,
    do: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(empty_like(x, q) for x in (q, k, v, decay, bonus, initial_state))  # type: ignore[return-value]


def _scan(
    config: Config, C: int, reverse: bool, read: Tensor, written: Tensor, z: Tensor, scores: Tensor, whole: Tensor,
    first: Tensor, out: Tensor, states: Tensor, last: Tensor, has_first: bool, has_last: bool, save: bool,
) -> None:  # fmt: skip
    B, T, H, K = read.shape
    V = z.shape[-1]
    block = min(config.block, padded(V))
    channel_kernels.scan_kernel[(B * H * triton.cdiv(V, block),)](
        read, written, z, scores, whole, first, out, states, last, T, H, *z.stride()[:3],
        K=K, V=V, BLOCK_K=padded(K), BLOCK=block, C=C, REVERSE=reverse, HAS_FIRST=has_first, HAS_LAST=has_last,
        SAVE=save, PRECISION=precision(read), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _group(bonus: Tensor | None, q: Tensor) -> int:
    """Sequences that share a bonus."""
    return q.shape[0] if bonus is None else q.shape[0] // bonus.shape[0]


def _results(q: Tensor, v: Tensor, C: int, return_state: bool, save: bool) -> tuple[Tensor, ...]:
    B, T, H, K = q.shape
    V, chunks = v.shape[-1], -(-T // C)
    shapes = [(B, H, chunks, C, C), (B, H, chunks, K), (B, H, chunks, K, V) if save else (B, 0)]
    dtypes = [q.dtype, torch.float32, q.dtype]
    scores, whole, states = (q.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True))
    last = q.new_empty((B, H, K, V) if return_state else (B, 0), dtype=torch.float32)
    return empty_like(v, q), empty_like(q, q), empty_like(q, q), scores, whole, states, last


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.return_state = inputs[6]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    do = torch.zeros_like(ctx.saved_tensors[2]) if do is None else do
    gradients = torch.ops.zoo.linear_recurrence_channels_backward(
        *ctx.saved_tensors, do, dlast if ctx.return_state else None
    )
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None)


forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(forward)
fold_batch(backward)


def prepare_config(q: Tensor, v: Tensor) -> Config:
    """Its chunk holds for all kernels of the op: a short one makes less work of a chunk, and a longer walk."""
    if q.dtype == torch.float32:
        return Config(chunk=16, block=32, num_warps=4, num_stages=1)
    return Config(chunk=16 if q.shape[1] <= 512 else 32, block=64, num_warps=1, num_stages=1)


def walk_config(q: Tensor, v: Tensor) -> Config:
    if padded(q.shape[-1]) > 64:
        return Config(chunk=0, block=32, num_warps=4 if padded(q.shape[-1]) <= 128 else 8, num_stages=3)
    return Config(chunk=0, block=64, num_warps=4, num_stages=4)


def chunks_backward_config(q: Tensor, v: Tensor, C: int) -> Config:
    """In chunks of 64 steps it would take wgmma, which Triton 3.6 miscompiles here: wrong dq, dk and ddecay in bf16."""
    if q.dtype == torch.float32 or C == 16:
        return Config(chunk=0, block=32, num_warps=4 if q.dtype == torch.float32 else 1, num_stages=1)
    return Config(chunk=0, block=64, num_warps=4, num_stages=1)
