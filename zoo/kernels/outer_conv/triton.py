"""Products turned to time as their last axis as they are made, convolved there, and turned back as they are read.

Every tensor of the custom ops has the batch, or the groups that divide the batch evenly and have kernels of their own,
as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch
from zoo.kernels.long_conv.triton import convolved, convolved_backward, time_dtype
from zoo.kernels.outer_conv import kernels


def outer_conv(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
    check_launch("outer_conv", q, k, v, kernel, skip)
    kernel = kernel[:, : q.shape[1]]
    return torch.ops.zoo.outer_conv(q, k, v, kernel[None], skip[None])[0]


@torch.library.custom_op("zoo::outer_conv", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, skip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, J, H), and the products (B, I, J, H, T) before and after the convolution."""
    B, I, H, T = k.shape
    J = v.shape[2]
    kv = k.new_empty(B, I, J, H, T, dtype=time_dtype(k, B * I * J // len(kernel), T))
    y = q.new_empty(B, T, J, H)
    programs, options = _launch(k, v)
    v, q = _rows(v), _rows(q)
    kernels.outer_kernel[programs](k.contiguous(), v, kv, T, *v.stride()[:2], **options)
    s = convolved(kv.view(-1, H, T), kernel, skip, T).view(kv.shape)
    kernels.read_kernel[programs](q, s, y, T, *q.stride()[:2], **options)
    return y, kv, s


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, skip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, I, H, T = k.shape
    J = v.shape[2]
    kv = k.new_empty(B, I, J, H, T, dtype=time_dtype(k, B * I * J // len(kernel), T))
    return q.new_empty(B, T, J, H), kv, torch.empty_like(kv)


@torch.library.custom_op("zoo::outer_conv_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, skip: Tensor, kv: Tensor, s: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and dkernel in fp32, whose first tap is dskip as well."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    H, T = k.shape[2:]
    programs, options = _launch(k, v)
    q, v, dy = _rows(q), _rows(v), _rows(dy)
    ds = torch.empty_like(kv)
    kernels.read_backward_kernel[programs](dy, q, s, dq, ds, T, *dy.stride()[:2], *q.stride()[:2], **options)
    dkv, dkernel = convolved_backward(ds.view(-1, H, T), kv.view(-1, H, T), kernel, skip)
    kernels.outer_backward_kernel[programs](dkv, k.contiguous(), v, dk, dv, T, *v.stride()[:2], **options)
    return dq, dk, dv, dkernel


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, skip: Tensor, kv: Tensor, s: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dkernel = kernel.new_empty(kernel.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dkernel


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    kernel, skip = ctx.saved_tensors[3:5]
    dq, dk, dv, dkernel = torch.ops.zoo.outer_conv_backward(*ctx.saved_tensors, dy)
    return dq, dk, dv, dkernel.to(kernel.dtype), dkernel[..., 0].to(skip.dtype)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def config_of(k: Tensor) -> Config:
    """chunk: tokens; block: heads."""
    return Config(chunk=64, block=min(32, triton.next_power_of_2(k.shape[2])), num_warps=4, num_stages=1)


def _launch(k: Tensor, v: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    B, I, H, T = k.shape
    config = configured("outer_conv", config_of, k)
    programs = B * triton.cdiv(T, config.chunk) * triton.cdiv(H, config.block)
    options = {"I": I, "J": v.shape[2], "H": H, "C": config.chunk, "BLOCK": config.block}
    return (programs,), options | {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _rows(x: Tensor) -> Tensor:
    """x (B, T, I, H) with the channels of a token in one piece."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()
