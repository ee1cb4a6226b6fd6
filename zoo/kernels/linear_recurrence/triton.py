"""The fused recurrence: one program per sequence, head and block of columns walks time with its state in registers.

Every tensor of the custom ops has the batch as its first axis; a decay is (B, H), (B, T, H) or (B, T, H, K).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.launch import Config, check_launch, configured, fold_batch, padded, rows
from zoo.kernels.linear_recurrence import channel_kernels, scalar_kernels
from zoo.kernels.linear_recurrence.scalar_kernels import NO_DECAY, PER_HEAD, PER_STEP

LARGEST_HEAD = 256


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    dtype = check_launch("linear_recurrence", q, k, v)
    B, T, H, K = q.shape
    if max(K, v.shape[-1]) > LARGEST_HEAD:
        raise UnsupportedError(
            f"linear_recurrence: heads of {K} and {v.shape[-1]} channels; the Triton backend has up to {LARGEST_HEAD}. "
            "Use more heads or pass impl='chunked'."
        )
    if bonus is not None:
        bonus = bonus.expand(B, H, K)
        # The kernels have the bonus where every channel has a decay.
        decay = q.new_zeros(1, dtype=torch.float32).expand(H) if decay is None else decay
    if decay is not None:
        decay = decay.expand(B, H) if decay.dim() == 1 else decay
        if bonus is not None and decay.dim() < 4:
            decay = (decay[:, None] if decay.dim() == 2 else decay)[..., None].expand(B, T, H, K)
    if initial_state is not None:
        initial_state = initial_state.float()
    o, S = torch.ops.zoo.linear_recurrence(
        q.to(dtype), k.to(dtype), v.to(dtype), decay, bonus, initial_state, return_state
    )
    return o.to(v.dtype), S if return_state else None


@torch.library.custom_op("zoo::linear_recurrence", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    V = v.shape[-1]
    q, k, v = rows(q), rows(k), rows(v)
    o = _empty_like(v, q)
    last = torch.empty(_state_shape(q, v, return_state), dtype=torch.float32, device=q.device)
    first = q if initial_state is None else initial_state.contiguous()
    sizes: dict[str, Any] = {"K": K, "V": V, "BLOCK_K": padded(K)}
    flags = {
        "HAS_FIRST": initial_state is not None,
        "HAS_LAST": return_state,
        "PRECISION": _precision(q),
    }
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    if decay is not None and decay.dim() == 4:
        config = configured("linear_recurrence.channel_forward", channel_config, q, v)
        u = q if bonus is None else rows(bonus)
        block = min(config.block, padded(V))
        channel_kernels.forward_kernel[(B * H * -(-V // block),)](
            q, k, v, decay, u, first, o, last, T, H, *strides, *decay.stride(), *u.stride()[:2],
            **sizes, BLOCK=block, C=config.chunk, HALVINGS=config.chunk.bit_length() - 1, BONUS=bonus is not None,
            **flags, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    else:
        config = configured("linear_recurrence.scalar_forward", scalar_config, q, v)
        block = min(config.block, padded(V))
        g, g_strides, kind = _scalar_decay(decay, q)
        scalar_kernels.forward_kernel[(B * H * -(-V // block),)](
            q, k, v, g, first, o, last, T, H, *strides, *g_strides,
            **sizes, BLOCK=block, C=config.chunk, DECAY=kind,
            **flags, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return o, last


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), q.new_empty(_state_shape(q, v, return_state), dtype=torch.float32)


@torch.library.custom_op("zoo::linear_recurrence_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    do: Tensor,
    dlast: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, ddecay, dbonus and dS_0; those without an input, and an unwanted ddecay, have no elements."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    q, k, v, do = rows(q), rows(k), rows(v), rows(do)
    dq, dk, dv = (_empty_like(x, q) for x in (q, k, v))
    dfirst = _empty_like(initial_state, q)
    first = q if initial_state is None else initial_state.contiguous()
    sizes: dict[str, Any] = {"K": K, "V": V, "BLOCK_K": padded(K), "BLOCK_V": padded(V)}
    flags = {
        "HAS_FIRST": initial_state is not None,
        "HAS_LAST": dlast is not None,
        "PRECISION": _precision(q),
    }
    dlast = q if dlast is None else dlast.contiguous()
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    if decay is not None and decay.dim() == 4:
        config = configured("linear_recurrence.channel_backward", channel_config, q, v)
        block_dk, block_dv = min(config.block, padded(K)), min(config.block, padded(V))
        u = q if bonus is None else rows(bonus)
        du, dg = _empty_like(bonus, q), _empty_like(decay, q)
        slopes = torch.empty(B, T, H, K, dtype=torch.float32, device=q.device)
        crossing = torch.empty(B, H, -(-T // config.chunk) + 1, K, dtype=torch.float32, device=q.device)
        channel_kernels.backward_kernel[(B * H * (-(-K // block_dk) - (-V // block_dv)),)](
            q, k, v, decay, u, first, do, dlast, dq, dk, dv, dg, du, dfirst, slopes, crossing, T, H,
            *strides, *decay.stride(), *u.stride()[:2], *do.stride()[:3],
            **sizes, BLOCK_DK=block_dk, BLOCK_DV=block_dv, C=config.chunk, HALVINGS=config.chunk.bit_length() - 1,
            BONUS=bonus is not None, **flags, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return dq, dk, dv, dg, du, dfirst

    rule = scalar_config if decay is None else scalar_decay_backward_config
    config = configured("linear_recurrence.scalar_backward", rule, q, v)
    block_dk, block_dv = min(config.block, padded(K)), min(config.block, padded(V))
    k_blocks, v_blocks = -(-K // block_dk), -(-V // block_dv)
    # A decay per head is one per step that is the same at each.
    per_step = decay[:, None].expand(B, T, H) if decay_gradient and decay is not None and decay.dim() == 2 else decay
    g, g_strides, kind = _scalar_decay(per_step, q)
    dg = crossing = _empty_like(None, q)
    if decay_gradient:
        dg = torch.empty(k_blocks, B, T, H, dtype=torch.float32, device=q.device)
        tokens = -(-T // config.chunk) * config.chunk
        crossing = torch.empty(B, H, k_blocks, tokens + 1, dtype=torch.float32, device=q.device)
    scalar_kernels.backward_kernel[(B * H * ((1 if decay_gradient else 2) * k_blocks + v_blocks),)](
        q, k, v, g, first, do, dlast, dq, dk, dv, dg, dfirst, crossing, T, H, B * T * H,
        *strides, *g_strides, *do.stride()[:3],
        **sizes, BLOCK_DK=block_dk, BLOCK_DV=block_dv, C=config.chunk, DECAY=kind, DECAY_GRADIENT=decay_gradient,
        **flags, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if decay is not None and decay_gradient:
        dg = dg.sum(0) if k_blocks > 1 else dg[0]
        dg = (dg.sum(1) if decay.dim() == 2 else dg).to(decay.dtype)
    return dq, dk, dv, dg, _empty_like(None, q), dfirst


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    do: Tensor,
    dlast: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = (q, k, v, decay if decay_gradient else None, bonus, initial_state)
    return tuple(_empty_like(x, q) for x in wanted)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.return_state = inputs[6]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, decay, bonus, initial_state = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dlast = dlast if ctx.return_state else None
    gradients = torch.ops.zoo.linear_recurrence_backward(
        q, k, v, decay, bonus, initial_state, do, dlast, ctx.needs_input_grad[3]
    )
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def scalar_config(q: Tensor, v: Tensor) -> Config:
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    if q.dtype == torch.float32:
        return Config(chunk=32 if widest <= 64 else 16, block=32, num_warps=4, num_stages=1)
    return Config(chunk=64 if widest <= 128 else 32, block=64, num_warps=4, num_stages=2)


def scalar_decay_backward_config(q: Tensor, v: Tensor) -> Config:
    # With four warps Triton 3.6 miscompiles this kernel for Hopper in bf16: wrong dq and dk, or illegal accesses.
    return scalar_config(q, v)._replace(num_warps=2)


def channel_config(q: Tensor, v: Tensor) -> Config:
    widest = max(padded(q.shape[-1]), padded(v.shape[-1]))
    return Config(chunk=16, block=32 if widest <= 128 else 16, num_warps=2, num_stages=2)


def _scalar_decay(decay: Tensor | None, q: Tensor) -> tuple[Tensor, tuple[int, int, int], int]:
    """The decay, its strides over batch, time and heads, and which kind the kernels should take it for."""
    if decay is None:
        return q, (0, 0, 0), NO_DECAY.value
    if decay.dim() == 2:
        return decay, (decay.stride(0), 0, decay.stride(1)), PER_HEAD.value
    return decay, (decay.stride(0), decay.stride(1), decay.stride(2)), PER_STEP.value


def _empty_like(x: Tensor | None, q: Tensor) -> Tensor:
    """Contiguous memory for the gradient of x; without an x, no elements, but q's batch, as vmap needs it."""
    if x is None:
        return q.new_empty(q.shape[0], 0)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _state_shape(q: Tensor, v: Tensor, return_state: bool) -> tuple[int, ...]:
    B, _, H, K = q.shape
    return (B, H, K, v.shape[-1]) if return_state else (B, 0)


def _precision(x: Tensor) -> str:
    """Three tf32 products are as good as one in fp32; 16-bit operands have nothing to lose."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
