"""A launch before and one after the long convolution, which has time last.

Every tensor of the custom ops has the batch, or the groups that divide the batch evenly and have weights of their own,
as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.hyena_conv import kernels
from zoo.kernels.launch import Config, check_launch, configured, fold_batch, rows
from zoo.kernels.long_conv.triton import convolved, convolved_backward, time_dtype, turn
from zoo.kernels.parts import sum_all
from zoo.kernels.short_conv.triton import PER_THREAD

# Tokens that the walk back loads at a time.
STEPS = 4


def hyena_conv(x1: Tensor, x2: Tensor, v: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
    check_launch("hyena_conv", x1, x2, v, weight, bias, kernel, skip)
    kernel = kernel[:, : v.shape[1]]
    return torch.ops.zoo.hyena_conv(x1, x2, v, weight[None], bias[None], kernel[None], skip[None])[0]


@torch.library.custom_op("zoo::hyena_conv", mutates_args=())
def _forward(
    x1: Tensor, x2: Tensor, v: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D), and what the long convolution takes and gives (B, D, T)."""
    B, T, D = v.shape
    u = v.new_empty(B, D, T, dtype=time_dtype(v, B // len(kernel), T))
    y = v.new_empty(B, T, D)
    x1, x2, v, weight, bias = rows(x1), rows(x2), rows(v), weight.contiguous(), bias.contiguous()
    programs, per_group, options = _launch(v, weight)
    kernels.enter_kernel[programs](
        x1, v, weight, bias, u, T, per_group, *x1.stride()[:2], *v.stride()[:2], **options
    )  # fmt: skip
    s = convolved(u, kernel, skip, T)
    kernels.leave_kernel[programs](x2, s, weight, bias, y, T, per_group, *x2.stride()[:2], **options)
    return y, u, s


@_forward.register_fake
def _(
    x1: Tensor, x2: Tensor, v: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = v.shape
    u = v.new_empty(B, D, T, dtype=time_dtype(v, B // len(kernel), T))
    return v.new_empty(v.shape), u, torch.empty_like(u)


@torch.library.custom_op("zoo::hyena_conv_backward", mutates_args=())
def _backward(
    x1: Tensor,
    x2: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor,
    skip: Tensor,
    u: Tensor,
    s: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx1, dx2, dv; in fp32 those of taps and biases (groups, 3, W + 1, D), and dkernel, whose first tap is dskip."""
    T, D = v.shape[1:]
    dx1, dx2, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (x1, x2, v))
    x1, x2, v, dy, weight, bias = rows(x1), rows(x2), rows(v), rows(dy), weight.contiguous(), bias.contiguous()
    programs, per_group, options = _launch(v, weight)
    groups, W = len(weight), weight.shape[3]

    def parts(number: int, rows: int) -> Tensor:
        return torch.empty(groups, number, rows, W + 1, D, dtype=torch.float32, device=v.device)

    parts_2 = parts(per_group * triton.cdiv(T, options["C"]), 1)
    ds = torch.empty_like(s)
    kernels.leave_backward_kernel[programs](
        dy, x2, s, weight, bias, ds, dx2, parts_2, T, per_group, *dy.stride()[:2], *x2.stride()[:2], **options
    )
    du_turned, dkernel = convolved_backward(ds, u, kernel, skip)
    du = torch.empty_like(dv)
    turn(du_turned, du, T)

    config = configured("hyena_conv.enter_backward", walk_config, v)
    options = {"D": D, "W": W, "C": config.chunk, "BLOCK": config.block, "STEPS": STEPS}
    options |= {"ROWS": max(1, PER_THREAD * 32 * config.num_warps // config.block)}
    number = triton.cdiv(per_group * triton.cdiv(T, config.chunk), options["ROWS"])
    parts_1_3 = parts(number, 2)
    kernels.enter_backward_kernel[(groups * number * triton.cdiv(D, config.block),)](
        du, x1, v, weight, bias, dx1, dv, parts_1_3, T, per_group, *x1.stride()[:2], *v.stride()[:2],
        num_warps=config.num_warps, num_stages=config.num_stages, **options,
    )  # fmt: skip
    outer, inner = sum_all([parts_1_3, parts_2], torch.float32)
    return dx1, dx2, dv, torch.cat([outer[:, :1], inner, outer[:, 1:]], dim=1), dkernel


@_backward.register_fake
def _(
    x1: Tensor,
    x2: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor,
    skip: Tensor,
    u: Tensor,
    s: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups, _, D, W = weight.shape
    dtaps = weight.new_empty(groups, 3, W + 1, D, dtype=torch.float32)
    dkernel = kernel.new_empty(kernel.shape, dtype=torch.float32)
    return x1.new_empty(x1.shape), x2.new_empty(x2.shape), v.new_empty(v.shape), dtaps, dkernel


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    weight, bias, kernel, skip = ctx.saved_tensors[3:7]
    dx1, dx2, dv, dtaps, dkernel = torch.ops.zoo.hyena_conv_backward(*ctx.saved_tensors, dy)
    dweight, dbias = dtaps[:, :, :-1].mT.to(weight.dtype), dtaps[:, :, -1].to(bias.dtype)
    return dx1, dx2, dv, dweight, dbias, dkernel.to(kernel.dtype), dkernel[..., 0].to(skip.dtype)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def config_of(v: Tensor) -> Config:
    """chunk: tokens; block: channels."""
    return Config(chunk=64, block=min(32, triton.next_power_of_2(v.shape[2])), num_warps=4, num_stages=1)


def walk_config(v: Tensor) -> Config:
    """chunk: tokens that a program walks; block: channels."""
    return Config(chunk=64, block=min(64, triton.next_power_of_2(v.shape[2])), num_warps=2, num_stages=1)


def _launch(v: Tensor, weight: Tensor) -> tuple[tuple[int], int, dict[str, Any]]:
    """Programs, sequences of a group, and options."""
    B, T, D = v.shape
    config = configured("hyena_conv", config_of, v)
    programs = B * triton.cdiv(T, config.chunk) * triton.cdiv(D, config.block)
    options = {"D": D, "W": weight.shape[3], "C": config.chunk, "BLOCK": config.block}
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return (programs,), B // len(weight), options
