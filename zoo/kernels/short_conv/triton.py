"""The fused short convolution: W multiply-adds on a tile, bias and activation included, one launch each way.

Every tensor of the custom ops has the batch, or the groups that divide the batch evenly and have their own weights,
as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, rows
from zoo.kernels.short_conv import kernels


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    check_launch("short_conv", x, weight, bias, initial_state)
    past = weight.shape[1] - 1
    first = initial_state.to(x.dtype) if initial_state is not None and past > 0 else None
    y = torch.ops.zoo.short_conv(x, weight[None], None if bias is None else bias[None], first, activation == "silu")
    cache = None
    if return_state:
        T = x.shape[1]
        seen = x if first is None or past <= T else torch.cat([first, x], dim=1)
        # F.pad copies even where it pads nothing: a slice would keep the whole sequence alive.
        cache = F.pad(seen[:, max(seen.shape[1] - past, 0) :], (0, 0, max(past - seen.shape[1], 0), 0))
    return y, cache


@torch.library.custom_op("zoo::short_conv", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None, silu: bool) -> Tensor:
    """x (B, T, D), weight (groups, D, W), bias (groups, D), first (B, W-1, D)."""
    B, T, D = x.shape
    x = rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    config = configured("short_conv.forward", config_of, x)
    arguments, options = _prepared(x, weight, bias, first, silu, config)
    grid = (B * triton.cdiv(T, config.chunk) * triton.cdiv(D, config.block),)
    kernels.forward_kernel[grid](*arguments, y, T, B // len(weight), *x.stride()[:2], **options)
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::short_conv_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None, dy: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, the gradients of the taps and of the bias behind them (groups, W or W+1, D) in fp32, and dfirst."""
    B, T, D = x.shape
    groups, _, W = weight.shape
    x, dy = rows(x), rows(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dfirst = torch.empty(_first_shape(x, first), dtype=x.dtype, device=x.device)
    config = configured("short_conv.backward", config_of, x)
    chunks = triton.cdiv(T if first is None else T + W - 1, config.chunk)
    dtaps = torch.empty(groups, B // groups * chunks, W + (bias is not None), D, dtype=torch.float32, device=x.device)
    arguments, options = _prepared(x, weight, bias, first, silu, config)
    kernels.backward_kernel[(B * chunks * triton.cdiv(D, config.block),)](
        *arguments, dy, dx, dtaps, dfirst, T, B // groups, *x.stride()[:2], *dy.stride()[:2], **options
    )
    return dx, dtaps.sum(1), dfirst


@_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None, dy: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups, D, W = weight.shape
    dtaps = x.new_empty(groups, W + (bias is not None), D, dtype=torch.float32)
    return x.new_empty(x.shape), dtaps, x.new_empty(_first_shape(x, first))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.silu = inputs[4]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, first = ctx.saved_tensors
    dx, dtaps, dfirst = torch.ops.zoo.short_conv_backward(x, weight, bias, first, dy, ctx.silu)
    W = weight.shape[2]
    dbias = None if bias is None else dtaps[:, W].to(bias.dtype)
    return dx, dtaps[:, :W].mT.to(weight.dtype), dbias, None if first is None else dfirst, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def config_of(x: Tensor) -> Config:
    block = min(triton.next_power_of_2(x.shape[-1]), 128)
    return Config(chunk=max(2048 // block, 16), block=block, num_warps=4, num_stages=1)


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None, silu: bool, config: Config
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The inputs of both kernels, and their options."""
    tensors = (x, weight.contiguous(), *(x if a is None else a.contiguous() for a in (bias, first)))
    options = {"D": x.shape[2], "W": weight.shape[2], "BLOCK": config.block, "C": config.chunk, "SILU": silu}
    options |= {"HAS_BIAS": bias is not None, "HAS_FIRST": first is not None}
    return tensors, options | {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _first_shape(x: Tensor, first: Tensor | None) -> tuple[int, ...]:
    """Without an initial state its gradient has no elements, but the batch, as vmap needs it."""
    return (x.shape[0], 0) if first is None else tuple(first.shape)


fold_batch(_forward)
fold_batch(_backward)
