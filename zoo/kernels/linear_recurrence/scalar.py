"""No decay, or one for all channels of a head: the custom ops around `scalar_kernels`. The batch is the first axis."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from zoo.kernels.launch import INTERPRETED, Config, configured, empty_like, fold_batch, padded, precision, rows
from zoo.kernels.linear_recurrence import scalar_kernels


@torch.library.custom_op("zoo::linear_recurrence", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, S_T and, for the backward pass, the state before each chunk and the decay since its start of each step.

    decay (B, H) or (B, T, H), skip (B, H). Without return_state S_T has no elements; nor have the last two without
    `save`, or where a backward pass needs none.
    """
    q, k, v = rows(q), rows(k), rows(v)
    config = configured("linear_recurrence.scalar_forward", forward_config, q, v)
    o, last, states, sums = _results(q, v, decay, return_state, save)
    kept = states if states.shape[1] else None
    copy = _small(q, v) and crowded(q) and copies_tiles(config.chunk, q, k, v)
    _carry(config, False, copy, q, k, v, decay, skip, initial_state, o, kept, last if return_state else None, sums)
    return o, last, states, sums


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(q, v, decay, return_state, save)


@torch.library.custom_op("zoo::linear_recurrence_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    sums: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, ddecay, dskip and dS_0; an unwanted ddecay and those of what is None have no elements."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    q, k, v, do = rows(q), rows(k), rows(v), rows(do)
    dq, dk, dv, dfirst = (empty_like(x, q) for x in (q, k, v, initial_state))
    if decay_gradient and not states.shape[1]:
        # Whether a decay per head needs a gradient is not known as the forward pass is run.
        states = _empty_states(q, v)
        config = configured("linear_recurrence.scalar_forward", forward_config, q, v)
        _carry(config, False, False, q, k, v, decay, None, initial_state, empty_like(v, q), states, None)
    C = _chunk(q, v)
    g, g_strides, kind = _kind(decay, q)
    through, through_strides = _skip(skip, q)
    copy = _small(q, v) and copies_tiles(C, q, k, v, do)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *g_strides, *do.stride()[:3])
    shared: dict[str, Any] = {"K": K, "V": V, "BLOCK_V": padded(V), "C": C, "DECAY": kind, "COPY": copy}
    shared |= {"HAS_FIRST": initial_state is not None, "HAS_LAST": dlast is not None, "PRECISION": precision(q)}
    shared |= {"SKIP": skip is not None, "DECAY_GRADIENT": decay_gradient}
    together = walks_twice(q, v, decay) and not decay_gradient
    alone = walks_alone(q) and not together
    if _small(q, v) and (alone or not decay_gradient):
        config = configured("linear_recurrence.scalar_walk_backward", walk_backward_config, q, v, alone)
        dg, dskip = _parts(q, decay_gradient, 1), _parts(q[:, :1], skip is not None, 1)
        shape = (B, H, triton.cdiv(T, C), 2 * C + padded(K)) if decay_gradient else (0,)
        terms = torch.empty(shape, dtype=torch.float32, device=q.device)
        q_, k_, v_, do_, dq_, dk_, dv_ = _tiles(copy, C, (q, K), (k, K), (v, V), (do, V), (dq, K), (dk, K), (dv, V))
        scalar_kernels.backward_kernel[(B * H * (1 if alone or together else 2),)](
            q_, k_, v_, g, through, q if initial_state is None else initial_state.contiguous(), states, sums, do_,
            q if dlast is None else dlast.contiguous(), dq_, dk_, dv_, dg, terms, dskip, dfirst, T, H, B * H, *strides,
            *through_strides, **shared, BLOCK_K=padded(K), ALONE=alone, TOGETHER=together,
            KEPT=sums.shape[1] > 0, ONE=T <= C, num_warps=config.num_warps, num_stages=config.num_stages,
            **registers(q, copy and T <= C),
        )  # fmt: skip
    else:
        config = configured("linear_recurrence.scalar_carry_backward", carry_backward_config, q, v)
        D = torch.empty_like(states)
        _carry(config, True, copy, k, q, do, decay, skip, dlast, dv, D, None if initial_state is None else dfirst)
        config = configured("linear_recurrence.scalar_chunks_backward", chunks_backward_config, q, v)
        block = min(config.block, padded(K))
        blocks = triton.cdiv(K, block)
        chunks = chunks_of_a_program(q, v, states.shape[2])
        groups = states.shape[2] // chunks
        dg, dskip = _parts(q, decay_gradient, blocks), _parts(q[:, :1], skip is not None, groups)
        q_, k_, v_, do_, dq_, dk_ = _tiles(copy, C, (q, block), (k, block), (v, V), (do, V), (dq, block), (dk, block))
        scalar_kernels.gradient_kernel[(B * H * groups * blocks,)](
            q_, k_, v_, g, do_, states, D, dq_, dk_, dg, dskip, T, H, B * T * H, *strides, **shared, BLOCK=block,
            CHUNKS=chunks, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    ddecay, dthrough = empty_like(None, q), empty_like(None, q)
    if decay is not None and decay_gradient:
        ddecay = _sum(dg).sum(1) if decay.dim() == 2 else _sum(dg)
        ddecay = ddecay.to(decay.dtype)
    if skip is not None:
        dthrough = _sum(dskip)[:, 0].to(skip.dtype)
    return dq, dk, dv, ddecay, dthrough, dfirst


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    sums: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = (q, k, v, decay if decay_gradient else None, skip, initial_state)
    return tuple(empty_like(x, q) for x in wanted)  # type: ignore[return-value]


def _results(
    q: Tensor, v: Tensor, decay: Tensor | None, return_state: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, H, K = q.shape
    last = q.new_empty((B, H, K, v.shape[-1]) if return_state else (B, 0), dtype=torch.float32)
    states = _empty_states(q, v) if save and needs_states(q, v, decay) else q.new_empty(B, 0)
    steps = decay is not None and decay.dim() == 3 and q.dtype != torch.float32
    keep = save and steps and _small(q, v) and walks_alone(q)
    sums = q.new_empty((B, H, states.shape[2] * _chunk(q, v)) if keep else (B, 0), dtype=torch.float32)
    return empty_like(v, q), last, states, sums


def _empty_states(q: Tensor, v: Tensor) -> Tensor:
    B, T, H, K = q.shape
    return q.new_empty(B, H, -(-T // _chunk(q, v)), K, v.shape[-1])


def _chunk(q: Tensor, v: Tensor) -> int:
    """The forward pass keeps a state a chunk, so the backward pass has the same chunks."""
    return configured("linear_recurrence.scalar_forward", forward_config, q, v).chunk


def _carry(
    config: Config, reverse: bool, copy: bool, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None,
    skip: Tensor | None, first: Tensor | None, o: Tensor, states: Tensor | None, last: Tensor | None,
    sums: Tensor | None = None,
) -> None:  # fmt: skip
    B, T, H, K = q.shape
    V = v.shape[-1]
    C = _chunk(q, v)
    block = min(config.block, padded(V))
    g, g_strides, kind = _kind(decay, q)
    through, through_strides = _skip(skip, q)
    q_, k_, v_, o_ = _tiles(copy, C, (q, K), (k, K), (v, block), (o, block))
    scalar_kernels.forward_kernel[(B * H * triton.cdiv(V, block),)](
        q_, k_, v_, g, through, q if first is None else first.contiguous(), o_, q if states is None else states,
        q if sums is None else sums, q if last is None else last, T, H, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *g_strides, *through_strides, K=K, V=V, BLOCK_K=padded(K), BLOCK=block, C=C, DECAY=kind,
        SKIP=skip is not None, REVERSE=reverse, HAS_FIRST=first is not None, HAS_LAST=last is not None,
        SAVE=states is not None, KEEP=sums is not None and sums.shape[1] > 0, PRECISION=precision(q), COPY=copy,
        ONE=T <= C, num_warps=config.num_warps, num_stages=config.num_stages, **registers(q, copy),
    )  # fmt: skip


def copies_tiles(C: int, *tensors: Tensor) -> bool:
    """Whether the GPU can copy chunks of them whole: 16 bits, no rest of T or D, rows in order and 16 bytes aligned."""
    T = tensors[0].shape[1]
    if not INTERPRETED and torch.cuda.get_device_capability(tensors[0].device)[0] < 9:
        return False
    return all(
        x.element_size() == 2
        and T % C == 0
        and x.shape[-1] == padded(x.shape[-1])
        and x.data_ptr() % 16 == 0
        and x.stride(1) % 8 == 0
        and x.stride(1) >= _width(x)
        and (x.shape[0] == 1 or x.stride(0) == T * x.stride(1))
        for x in tensors
    )


def _tiles(copy: bool, C: int, *tensors: tuple[Tensor, int]) -> list[Any]:
    """Each (B, T, H, D) as rows of all its heads, to copy C steps and so many channels; as it is without `copy`."""
    if not copy:
        return [x for x, _ in tensors]
    return [
        TensorDescriptor(x, [x.shape[0] * x.shape[1], _width(x)], [x.stride(1), 1], [C, channels])
        for x, channels in tensors
    ]


def _width(x: Tensor) -> int:
    return (x.shape[2] - 1) * x.stride(2) + x.shape[3]


def _kind(decay: Tensor | None, q: Tensor) -> tuple[Tensor, tuple[int, int, int], int]:
    """The decay, its strides over batch, time and heads, and which kind the kernels should take it for."""
    if decay is None:
        return q, (0, 0, 0), scalar_kernels.NO_DECAY.value
    if decay.dim() == 2:
        return decay, (decay.stride(0), 0, decay.stride(1)), scalar_kernels.PER_HEAD.value
    return decay, (decay.stride(0), decay.stride(1), decay.stride(2)), scalar_kernels.PER_STEP.value


def _skip(skip: Tensor | None, q: Tensor) -> tuple[Tensor, tuple[int, int]]:
    return (q, (0, 0)) if skip is None else (skip, (skip.stride(0), skip.stride(1)))


def _parts(q: Tensor, wanted: bool, parts: int) -> Tensor:
    """Memory for `parts` terms of a sum for each step and head, none unless wanted."""
    return torch.empty(parts if wanted else 0, *q.shape[:3], dtype=torch.float32, device=q.device)


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.return_state = inputs[6]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    do = torch.zeros_like(ctx.saved_tensors[2]) if do is None else do
    gradients = torch.ops.zoo.linear_recurrence_backward(
        *ctx.saved_tensors, do, dlast if ctx.return_state else None, ctx.needs_input_grad[3]
    )
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None)


forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(forward)
fold_batch(backward)


def forward_config(q: Tensor, v: Tensor) -> Config:
    """Its chunk holds for the backward pass too."""
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if q.dtype == torch.float32:
        return Config(chunk=32 if widest <= 64 else 16, block=32, num_warps=4, num_stages=1)
    if widest > 64:
        return Config(chunk=32, block=64 if widest <= 128 else 32, num_warps=4, num_stages=3)
    # A single chunk has no next one to load meanwhile.
    stages = 2 if q.shape[1] <= 64 else 3 if _many_heads(q) else 4
    return Config(chunk=64, block=64, num_warps=4, num_stages=stages)


def needs_states(q: Tensor, v: Tensor, decay: Tensor | None) -> bool:
    """Whether a backward pass is expected to read the state before each chunk."""
    if decay is not None and decay.dim() == 3:
        return True
    return not _small(q, v) or (walks_alone(q) and not walks_twice(q, v, decay))


def walks_alone(q: Tensor) -> bool:
    """Whether one program makes all gradients: where it has enough of them, or few steps."""
    return _many_heads(q) or q.shape[1] <= 256


def walks_twice(q: Tensor, v: Tensor, decay: Tensor | None) -> bool:
    """Whether that program takes two walks: without decays per step, they take less than states of several chunks."""
    return walks_alone(q) and (decay is None or decay.dim() == 2) and q.shape[1] > _chunk(q, v)


def walk_backward_config(q: Tensor, v: Tensor, alone: bool) -> Config:
    """Two of its programs fit into the shared memory of a multiprocessor."""
    stages = 2 if alone else 3
    return Config(chunk=0, block=0, num_warps=4, num_stages=1 if q.dtype == torch.float32 else stages)


def carry_backward_config(q: Tensor, v: Tensor) -> Config:
    if q.dtype == torch.float32:
        return forward_config(q, v)
    return Config(chunk=0, block=64 if _many_heads(q) else 32, num_warps=4, num_stages=3)


def chunks_backward_config(q: Tensor, v: Tensor) -> Config:
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    block = 64 if padded(v.shape[-1]) <= 128 else 32
    return Config(chunk=0, block=block, num_warps=4, num_stages=2 if widest <= 64 and q.dtype != torch.float32 else 1)


def chunks_of_a_program(q: Tensor, v: Tensor, chunks: int) -> int:
    """More than one, so that the next is loaded meanwhile, where enough programs are left."""
    several = _small(q, v) and q.dtype != torch.float32 and q.shape[0] * q.shape[2] * chunks >= 1024
    return math.gcd(chunks, 4) if several else 1


def _small(q: Tensor, v: Tensor) -> bool:
    return max(padded(q.shape[-1]), padded(v.shape[-1])) <= 64


def crowded(q: Tensor) -> bool:
    """More than three programs for each multiprocessor."""
    return q.shape[0] * q.shape[2] >= 512


def registers(q: Tensor, few: bool) -> dict[str, int]:
    """For a launch: so many a thread that a third program has room beside two, where `few` are enough."""
    return {"maxnreg": 168} if few and crowded(q) else {}


def _many_heads(q: Tensor) -> bool:
    """About two programs for each multiprocessor."""
    return q.shape[0] * q.shape[2] >= 256
