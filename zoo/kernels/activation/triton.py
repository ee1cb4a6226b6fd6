"""Bias, function and scale in one pass over memory, both gradients in another.

Every tensor of the custom ops has the groups, each with a bias of its own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.activation import kernels
from zoo.kernels.launch import Config, check_launch, configured, fold_batch, rows, split_rows
from zoo.kernels.parts import sum_parts

# Programs: enough to keep the memory of a GPU busy, and, where each leaves a sum of its own, not many more.
PROGRAMS = 16384
SUMMING_PROGRAMS = 2048
KINDS = {
    "softplus": kernels.SOFTPLUS.value,
    "logsigmoid": kernels.LOGSIGMOID.value,
    "sigmoid": kernels.SIGMOID.value,
    "exp": kernels.EXP.value,
}


def activation(x: Tensor, bias: Tensor, kind: str, scale: float) -> Tensor:
    check_launch("activation", x, bias)
    if x.numel() == 0:
        return x.float()
    return torch.ops.zoo.activation(x.reshape(1, -1, x.shape[-1]), bias[None], kind, scale).view(x.shape)


@torch.library.custom_op("zoo::activation", mutates_args=())
def _forward(x: Tensor, bias: Tensor, kind: str, scale: float) -> Tensor:
    """x (groups, M, D), bias (groups, D)."""
    x = rows(x)
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    programs, split, options = _launch(x, kind, configured("activation.forward", config_of, x), PROGRAMS)
    kernels.forward_kernel[(programs,)](x, bias.contiguous(), y, *split, scale, *x.stride()[:2], **options)
    return y


@_forward.register_fake
def _(x: Tensor, bias: Tensor, kind: str, scale: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("zoo::activation_backward", mutates_args=())
def _backward(x: Tensor, bias: Tensor, dy: Tensor, kind: str, scale: float) -> tuple[Tensor, Tensor]:
    x, dy = rows(x), rows(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    programs, split, options = _launch(x, kind, configured("activation.backward", config_of, x), SUMMING_PROGRAMS)
    sums = torch.empty(len(x), programs // len(x), x.shape[2], dtype=torch.float32, device=x.device)
    kernels.backward_kernel[(programs,)](
        x, bias.contiguous(), dy, dx, sums, *split, scale, *x.stride()[:2], *dy.stride()[:2], **options
    )
    return dx, sum_parts(sums, bias.dtype)


@_backward.register_fake
def _(x: Tensor, bias: Tensor, dy: Tensor, kind: str, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def config_of(x: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=2048, num_warps=4, num_stages=1)


def _launch(x: Tensor, kind: str, config: Config, most: int) -> tuple[int, tuple[int, int, int], dict[str, Any]]:
    """How many programs; tokens, blocks of a program and programs of a group; and options."""
    groups, M, D = x.shape
    block = triton.next_power_of_2(D)
    rows_of_block, steps, parts = split_rows(M, block, config, most // groups)
    options = {"KIND": KINDS[kind], "D": D, "BLOCK_D": block, "ROWS": rows_of_block, "num_warps": config.num_warps}
    return groups * parts, (M, steps, parts), options


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.kind, ctx.scale = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.zoo.activation_backward(*ctx.saved_tensors, dy, ctx.kind, ctx.scale), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
