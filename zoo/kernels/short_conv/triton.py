"""The fused short convolution: W multiply-adds on a tile, bias and activation included, one launch forward, two back.

Every tensor of the custom ops has the batch, or the groups that divide the batch evenly and have their own weights,
as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, empty_like, fold_batch, rows
from zoo.kernels.short_conv import kernels

# Channels of a thread: one load of 8 bytes in 16-bit dtypes.
PER_THREAD = 4
SUM_ROWS, SUM_COLUMNS = 512, 8


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    check_launch("short_conv", x, weight, bias, initial_state)
    past = weight.shape[1] - 1
    first = initial_state.to(x.dtype) if initial_state is not None and past > 0 else None
    gate = None if gate is None else gate.to(x.dtype)
    bias = None if bias is None else bias[None]
    y = torch.ops.zoo.short_conv(x, weight[None], bias, gate, first, activation == "silu")
    cache = None
    if return_state:
        T = x.shape[1]
        seen = x if first is None or past <= T else torch.cat([first, x], dim=1)
        # F.pad copies even where it pads nothing: a slice would keep the whole sequence alive.
        cache = F.pad(seen[:, max(seen.shape[1] - past, 0) :], (0, 0, max(past - seen.shape[1], 0), 0))
    return y, cache


@torch.library.custom_op("zoo::short_conv", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, first: Tensor | None, silu: bool
) -> Tensor:
    """x and gate (B, T, D), weight (groups, D, W), bias (groups, D), first (B, W-1, D)."""
    B, T, D = x.shape
    groups = len(weight)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    config = configured("short_conv.forward", forward_config, x)
    arguments, strides, options = _prepared(x, weight, bias, gate, first, silu, config)
    parts = triton.cdiv(B // groups * triton.cdiv(T, options["C"]), options["ROWS"])
    kernels.forward_kernel[(groups * parts * triton.cdiv(D, options["BLOCK"]),)](
        *arguments, y, T, B // groups, *strides, **options
    )
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, first: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::short_conv_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, first: Tensor | None, dy: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias, gate and first; of those that are None, no elements."""
    B, T, D = x.shape
    groups, _, W = weight.shape
    dy = rows(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias, dgate, dfirst = empty_like(bias, weight), empty_like(gate, x), empty_like(first, x)
    config = configured("short_conv.backward", backward_config, x)
    arguments, strides, options = _prepared(x, weight, bias, gate, first, silu, config)
    chunks = triton.cdiv(T if first is None else T + W - 1, options["C"])
    parts = triton.cdiv(B // groups * chunks, options["ROWS"])
    sums = torch.empty(groups, parts, W + (bias is not None), D, dtype=torch.float32, device=x.device)
    # Tokens that are loaded at a time; a gate takes registers too.
    steps = 8 if gate is None else 4
    kernels.backward_kernel[(groups * parts * triton.cdiv(D, options["BLOCK"]),)](
        *arguments, dy, dx, sums, dgate, dfirst, T, B // groups, *strides, *dy.stride()[:2], STEPS=steps, **options
    )
    kernels.sum_kernel[(groups * triton.cdiv(sums.shape[2] * D, SUM_COLUMNS),)](
        sums, dweight, dbias, parts, D=D, W=W, HAS_BIAS=bias is not None, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS
    )
    return dx, dweight, dbias, dgate, dfirst


@_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, first: Tensor | None, dy: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias = x.new_empty(x.shape), weight.new_empty(weight.shape), empty_like(bias, weight)
    return dx, dweight, dbias, empty_like(gate, x), empty_like(first, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = torch.ops.zoo.short_conv_backward(*tensors, dy, ctx.silu)
    return *(None if t is None else gradient for t, gradient in zip(tensors, gradients, strict=True)), None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def forward_config(x: Tensor) -> Config:
    """chunk: tokens that a program walks; block: channels."""
    return Config(chunk=16, block=min(triton.next_power_of_2(x.shape[-1]), 64), num_warps=4, num_stages=1)


def backward_config(x: Tensor) -> Config:
    """Longer chunks leave fewer parts of the weight's gradient to sum, but fewer programs."""
    chunk = 64 if x.shape[1] >= 128 and x.numel() >= 2**24 else 32
    return Config(chunk=chunk, block=min(triton.next_power_of_2(x.shape[-1]), 64), num_warps=2, num_stages=1)


def _prepared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    first: Tensor | None,
    silu: bool,
    config: Config,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """The inputs of both kernels (x stands in for what is None), strides of x, gate, weight and bias, options."""
    x, weight = rows(x), weight if weight.stride()[1:] == (weight.shape[2], 1) else weight.contiguous()
    by_token, shift = x if gate is None else rows(gate), weight if bias is None else rows(bias)
    tensors = (x, weight, shift, by_token, x if first is None else first.contiguous())
    options = {"D": x.shape[2], "W": weight.shape[2], "BLOCK": config.block, "C": config.chunk, "SILU": silu}
    options |= {"ROWS": max(1, PER_THREAD * 32 * config.num_warps // config.block)}
    options |= {"HAS_BIAS": bias is not None, "HAS_GATE": gate is not None, "HAS_FIRST": first is not None}
    strides = (*x.stride()[:2], *by_token.stride()[:2], weight.stride(0), shift.stride(0))
    return tensors, strides, options | {"num_warps": config.num_warps, "num_stages": config.num_stages}


fold_batch(_forward)
fold_batch(_backward)
