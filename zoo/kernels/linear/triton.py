"""The fused linear layer for tall inputs: the bias in the product's epilogue, its gradient beside the weight's.

Every tensor of the custom ops has the groups, layers with weights of their own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, padded, precision, rows
from zoo.kernels.linear import kernels
from zoo.kernels.parts import sum_all

# Programs that share the rows of the weight's gradient: one for each multiprocessor, and few enough to add up.
PROGRAMS = 128


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_launch("linear", x, weight)
    K, N = x.shape[-1], len(weight)
    if x.numel() == 0:
        return x @ weight.T.to(x.dtype)
    # Without a bias the weight stands in for it, and is not read.
    y = torch.ops.zoo.linear(
        x.reshape(1, -1, K), weight[None], (weight if bias is None else bias)[None], bias is not None
    )
    return y.view(*x.shape[:-1], N)


@torch.library.custom_op("zoo::linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, has_bias: bool) -> Tensor:
    groups, M, K = x.shape
    N = weight.shape[1]
    x, weight = rows(x), weight.to(x.dtype).contiguous()
    if not has_bias:
        return torch.bmm(x, weight.mT)
    y = x.new_empty(groups, M, N)
    config = configured("linear.forward", forward_config, x, N)
    row_blocks, column_blocks = triton.cdiv(M, config.chunk), triton.cdiv(N, config.block)
    kernels.forward_kernel[(groups * row_blocks * column_blocks,)](
        x, weight, bias.contiguous(), y, M, N, *x.stride()[:2], row_blocks, column_blocks,
        K=K, BLOCK_K=min(64, padded(K)), ROWS=config.chunk, COLUMNS=config.block, BIAS=has_bias,
        PRECISION=precision(x), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, has_bias: bool) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[1])


@torch.library.custom_op("zoo::linear_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, dy: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = rows(x), dy.contiguous()
    dx = torch.bmm(dy, weight.to(dy.dtype))
    dweight, *dbias = (total.squeeze(0) for total in sum_all(weight_parts(x, dy, has_bias), weight.dtype))
    return dx, dweight, dbias[0] if has_bias else weight.new_empty(len(weight), 0)


@_backward.register_fake
def _(x: Tensor, weight: Tensor, dy: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    groups, N, _ = weight.shape
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(groups, N if has_bias else 0)


def weight_parts(x: Tensor, dy: Tensor, has_bias: bool = False) -> list[Tensor]:
    """dy^T x (1, parts, groups, N, K) and, if asked, sums of dy (1, parts, groups, N), in fp32, for `sum_all`.

    x (groups, M, K) with a channel stride of 1, dy (groups, M, N) contiguous.
    """
    groups, M, K = x.shape
    N = dy.shape[2]
    config = configured("linear.weight", weight_config, x, N)
    n_blocks, k_blocks = triton.cdiv(N, config.block), triton.cdiv(K, min(128, padded(K)))
    blocks = triton.cdiv(M, config.chunk)
    steps = triton.cdiv(blocks, max(1, PROGRAMS // (groups * n_blocks * k_blocks)))
    parts = triton.cdiv(blocks, steps)
    dweight = torch.empty(1, parts, groups, N, K, dtype=torch.float32, device=x.device)
    dbias = torch.empty(1, parts, groups, N, dtype=torch.float32, device=x.device) if has_bias else dweight
    kernels.weight_kernel[(groups * parts * n_blocks * k_blocks,)](
        x, dy, dweight, dbias, M, N, K, groups, *x.stride()[:2], steps, parts, n_blocks, k_blocks,
        ROWS=config.chunk, COLUMNS=config.block, BLOCK_K=min(128, padded(K)), BIAS=has_bias,
        PRECISION=precision(x), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return [dweight, dbias] if has_bias else [dweight]


def forward_config(x: Tensor, N: int) -> Config:
    """chunk: rows of x; block: columns of y."""
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=2)
    widest = 64 if x.shape[-1] <= 64 else 128
    return Config(chunk=64, block=min(widest, padded(N)), num_warps=4, num_stages=3)


def weight_config(x: Tensor, N: int) -> Config:
    """chunk: rows of x and dy at a time; block: rows of the weight."""
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=2)
    return Config(chunk=128, block=min(64, padded(N)), num_warps=4, num_stages=3)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.has_bias = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = torch.ops.zoo.linear_backward(*ctx.saved_tensors, dy, ctx.has_bias)
    return dx, dweight, dbias.to(ctx.bias_dtype) if ctx.has_bias else None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
