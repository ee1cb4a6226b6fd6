"""All mixtures in one pass over memory, all gradients in another.

Every tensor of the custom ops has the groups, each with weights of its own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, empty_like, fold_batch, split_rows
from zoo.kernels.parts import sum_parts
from zoo.kernels.token_shift import kernels

# Programs: enough to keep the memory of a GPU busy, and, where each leaves a sum of its own, not many more.
PROGRAMS = 16384
SUMMING_PROGRAMS = 1024


def token_shift(x: Tensor, weight: Tensor, offset: Tensor | None, previous: Tensor | None) -> list[Tensor]:
    check_launch("token_shift", x, weight, offset, previous)
    if x.numel() == 0:
        return [x] * len(weight)
    groups = (None if t is None else t[None] for t in (x, weight, offset, previous))
    return [y.squeeze(0) for y in torch.ops.zoo.token_shift(*groups)]


@torch.library.custom_op("zoo::token_shift", mutates_args=())
def _forward(x: Tensor, weight: Tensor, offset: Tensor | None, previous: Tensor | None) -> list[Tensor]:
    """x (groups, B, T, D), weight (groups, N, D), offset (groups, N, B, T, D), previous (groups, B, D)."""
    config = configured("token_shift.forward", config_of, x)
    tensors, programs, launch = _prepared(x, weight, offset, previous, config, PROGRAMS)
    ys = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(weight.shape[1])]
    kernels.forward_kernel[(programs,)](*tensors, tuple(ys), **launch)
    return ys


@_forward.register_fake
def _(x: Tensor, weight: Tensor, offset: Tensor | None, previous: Tensor | None) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in range(weight.shape[1])]


@torch.library.custom_op("zoo::token_shift_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, offset: Tensor | None, previous: Tensor | None, dys: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, offset and previous; of those that are None, no elements."""
    config = configured("token_shift.backward", backward_config, x)
    tensors, programs, launch = _prepared(x, weight, offset, previous, config, SUMMING_PROGRAMS)
    dx, doffset, dprevious = (empty_like(t, x) for t in (x, offset, previous))
    groups, N, D = weight.shape
    sums = torch.empty(groups, launch["parts"], N, D, dtype=torch.float32, device=x.device)
    kernels.backward_kernel[(programs,)](
        *tensors, tuple(dy.contiguous() for dy in dys), dx, sums, doffset, dprevious, **launch
    )
    return dx, sum_parts(sums, weight.dtype), doffset, dprevious


@_backward.register_fake
def _(
    x: Tensor, weight: Tensor, offset: Tensor | None, previous: Tensor | None, dys: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(empty_like(t, x) for t in (x, weight, offset, previous))  # type: ignore[return-value]


def config_of(x: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=2048, num_warps=4, num_stages=1)


def backward_config(x: Tensor) -> Config:
    """16 elements a thread, whose sums for all mixtures are in registers; where a warp is enough, no barriers."""
    block = max(512, triton.next_power_of_2(x.shape[-1]))
    return Config(chunk=1, block=block, num_warps=min(8, block // 512), num_stages=1)


def _prepared(
    x: Tensor, weight: Tensor, offset: Tensor | None, previous: Tensor | None, config: Config, most: int
) -> tuple[list[Tensor], int, dict[str, Any]]:
    """The inputs of both kernels (x stands in for what is None), how many programs, and their options."""
    groups, B, T, D = x.shape
    block = triton.next_power_of_2(D)
    rows_of_block, steps, parts = split_rows(B * T, block, config, most // groups)
    options = {"B": B, "T": T, "steps": steps, "parts": parts, "D": D, "BLOCK_D": block, "ROWS": rows_of_block}
    options |= {"N": weight.shape[1], "HAS_OFFSET": offset is not None, "HAS_PREVIOUS": previous is not None}
    tensors = [(x if t is None else t).contiguous() for t in (x, weight, offset, previous)]
    return tensors, groups * parts, {**options, "num_warps": config.num_warps}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dys: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    slopes = [torch.zeros_like(tensors[0]) if dy is None else dy for dy in dys]
    gradients = torch.ops.zoo.token_shift_backward(*tensors, slopes)
    return tuple(None if t is None else gradient for t, gradient in zip(tensors, gradients, strict=True))


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
