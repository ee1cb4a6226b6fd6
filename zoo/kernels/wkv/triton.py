"""The fused average: each way one launch that reads every input once and keeps one state a chunk in memory.

Every tensor of the custom ops has the batch, or the groups that divide the batch evenly and have their own decay and
bonus, as its first axis. A state is (B, 3, D): numerator, denominator, largest.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, rows
from zoo.kernels.parts import sum_all
from zoo.kernels.wkv import kernels


def wkv(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, initial_state: tuple[Tensor, ...] | None, return_state: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    check_launch("wkv", k, v, decay, bonus)
    first = None if initial_state is None else torch.stack([x.float() for x in initial_state], dim=1)
    o, last, _ = torch.ops.zoo.wkv(k, v, decay[None], bonus[None], first, return_state, torch.is_grad_enabled())
    return o, last.unbind(1) if return_state else None


@torch.library.custom_op("zoo::wkv", mutates_args=())
def _forward(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, first: Tensor | None, return_state: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state and, to `keep` for the backward, the states before each chunk: (B, chunks, 3, D)."""
    B, T, D = k.shape
    k, v, config = rows(k), rows(v), configured("wkv.walk", config_of, D)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    last, kept = (
        torch.empty(shape, dtype=torch.float32, device=k.device) for shape in _state_shapes(k, return_state, keep)
    )
    kernels.forward_kernel[(B * triton.cdiv(D, config.block),)](
        k, v, decay.contiguous(), bonus.contiguous(), k if first is None else first.contiguous(), o, last, kept,
        T, B // len(decay), k.stride(0), v.stride(0), k.stride(1), v.stride(1),
        HAS_FIRST=first is not None, HAS_LAST=return_state, KEEP=keep, **_options(D, config),
    )  # fmt: skip
    return o, last, kept


@_forward.register_fake
def _(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, first: Tensor | None, return_state: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    last, kept = (k.new_empty(shape, dtype=torch.float32) for shape in _state_shapes(k, return_state, keep))
    return v.new_empty(v.shape), last, kept


@torch.library.custom_op("zoo::wkv_backward", mutates_args=())
def _backward(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    last: Tensor,
    kept: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    has_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of k, v, decay, bonus and the initial state; the last without elements unless `has_first`."""
    B, T, D = k.shape
    k, v, do, config = rows(k), rows(v), rows(do), configured("wkv.walk", config_of, D)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    parts = [torch.empty(B, D, dtype=torch.float32, device=k.device) for _ in range(2)]
    dfirst = torch.empty(B, 3 if has_first else 0, D, dtype=torch.float32, device=k.device)
    kernels.backward_kernel[(B * triton.cdiv(D, config.block),)](
        k, v, decay.contiguous(), bonus.contiguous(), kept, last, do, kept if dlast is None else dlast.contiguous(),
        dk, dv, *parts, dfirst, T, B // len(decay), k.stride(0), v.stride(0), do.stride(0),
        k.stride(1), v.stride(1), do.stride(1),
        HAS_FIRST=has_first, HAS_LAST=dlast is not None, **_options(D, config),
    )  # fmt: skip
    ddecay, dbonus = sum_all([part.unflatten(0, (len(decay), -1)) for part in parts], torch.float32)
    return dk, dv, ddecay.to(decay.dtype), dbonus.to(bonus.dtype), dfirst


@_backward.register_fake
def _(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    last: Tensor,
    kept: Tensor,
    do: Tensor,
    dlast: Tensor | None,
    has_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dfirst = k.new_empty(k.shape[0], 3 if has_first else 0, k.shape[2], dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (k, v, decay, bonus)), dfirst  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.has_first, ctx.return_state = inputs[4] is not None, inputs[5]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dlast: Tensor | None, dkept: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    do = torch.zeros_like(tensors[1]) if do is None else do
    gradients = torch.ops.zoo.wkv_backward(*tensors, do, dlast if ctx.return_state else None, ctx.has_first)
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def config_of(D: int) -> Config:
    """chunk: steps whose states the backward holds in registers; block: channels, one or two a thread."""
    return Config(chunk=8, block=32, num_warps=1, num_stages=1)


def _options(D: int, config: Config) -> dict[str, int]:
    return {
        "D": D, "BLOCK": config.block, "S": config.chunk,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def _state_shapes(k: Tensor, return_state: bool, keep: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    B, T, D = k.shape
    chunks = triton.cdiv(T, configured("wkv.walk", config_of, D).chunk)
    return (B, 3, D) if return_state else (B, 0), (B, chunks, 3, D) if keep else (B, 0)
