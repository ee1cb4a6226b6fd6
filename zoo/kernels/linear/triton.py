"""The fused linear layer for tall inputs: the bias in the product's epilogue, its gradient beside the weight's.

Every tensor of the custom ops has the groups, layers with weights of their own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.launch import Config, cast, check_launch, configured, fold_batch, padded, precision, rows
from zoo.kernels.linear import kernels
from zoo.kernels.parts import sum_all
from zoo.kernels.streams import join, lane

# Programs that share the rows of the weights' gradients: as many as run at once, and few enough to add up.
PROGRAMS = 128
PROGRAMS_OF_HALF = 256


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_launch("linear", x, weight)
    K, N = x.shape[-1], len(weight)
    if x.numel() == 0:
        return x @ weight.T.to(x.dtype)
    # Without a bias the weight stands in for it, and is not read.
    y, _ = torch.ops.zoo.linear(
        x.reshape(1, -1, K), weight[None], (weight if bias is None else bias)[None], bias is not None
    )
    return y.view(*x.shape[:-1], N)


@torch.library.custom_op("zoo::linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """y, and weight as `cast` gives it."""
    groups, M, K = x.shape
    N = weight.shape[1]
    given = cast(weight, x.dtype)
    x, weight = rows(x), (given if given.numel() else weight).contiguous()
    if not has_bias:
        return torch.bmm(x, weight.mT), given
    y = x.new_empty(groups, M, N)
    config = configured("linear.forward", forward_config, x, N)
    row_blocks, column_blocks = triton.cdiv(M, config.chunk), triton.cdiv(N, config.block)
    kernels.forward_kernel[(groups * row_blocks * column_blocks,)](
        x, weight, bias.contiguous(), y, M, N, *x.stride()[:2], row_blocks, column_blocks,
        K=K, BLOCK_K=min(64, padded(K)), ROWS=config.chunk, COLUMNS=config.block, BIAS=has_bias,
        PRECISION=precision(x), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, given


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], weight.shape[1]), cast(weight, x.dtype)


@torch.library.custom_op("zoo::linear_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, given: Tensor, dy: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = rows(x), dy.contiguous()
    with lane(x, "weights"):
        dweight, *dbias = weight_gradients(x, [dy], has_bias, weight.dtype)
    dx = torch.bmm(dy, given if given.numel() else weight)
    join(x, "weights")
    return dx, dweight, dbias[0] if has_bias else weight.new_empty(len(weight), 0)


@_backward.register_fake
def _(x: Tensor, weight: Tensor, given: Tensor, dy: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    groups, N, _ = weight.shape
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(groups, N if has_bias else 0)


def weight_gradients(x: Tensor, dys: list[Tensor], has_bias: bool, dtype: torch.dtype) -> list[Tensor]:
    """For each dy dy^T x (groups, N, K) and, if asked, the sum of dy (groups, N), summed in fp32, in `dtype`.

    x (groups, M, K) with a channel stride of 1, each dy (groups, M, N) contiguous.
    """
    # In one launch rows of all dy must begin at 32 bytes: to copy what is narrow takes less than a launch of its own.
    wide = [F.pad(dy, (0, -dy.shape[2] % 16)) if dy.shape[2] % 16 else dy for dy in dys]
    totals = [total.squeeze(0) for total in sum_all(_weight_parts(x, wide, has_bias), dtype)]
    sizes = [dy.shape[2] for dy in dys for _ in range(1 + has_bias)]
    return [total[:, :N] for total, N in zip(totals, sizes, strict=True)]


def _weight_parts(x: Tensor, dys: list[Tensor], has_bias: bool) -> list[Tensor]:
    """Each (1, parts, groups, N, K) or (1, parts, groups, N), in fp32, in one launch."""
    groups, M, K = x.shape
    sizes = tuple(dy.shape[2] for dy in dys)
    config = configured("linear.weight", weight_config, x, sum(sizes))
    k_blocks = triton.cdiv(K, min(128, padded(K)))
    blocks = k_blocks * sum(triton.cdiv(N, config.block) for N in sizes)
    row_blocks = triton.cdiv(M, config.chunk)
    # With half the rows at a time, two of them fit on a multiprocessor.
    programs = PROGRAMS_OF_HALF if config.chunk == 64 else PROGRAMS
    steps = triton.cdiv(row_blocks, max(1, programs // (groups * blocks)))
    parts = triton.cdiv(row_blocks, steps)
    dweights = [torch.empty(1, parts, groups, N, K, dtype=torch.float32, device=x.device) for N in sizes]
    dbiases = [x.new_empty(1, parts, groups, N if has_bias else 0, dtype=torch.float32) for N in sizes]
    kernels.weight_kernel[(groups * parts * blocks,)](
        x, tuple(dys), tuple(dweights), tuple(dbiases) if has_bias else tuple(dweights), sizes, M, K, groups,
        *x.stride()[:2], steps, parts, blocks, k_blocks,
        COUNT=len(dys), ROWS=config.chunk, COLUMNS=config.block, BLOCK_K=min(128, padded(K)), BIAS=has_bias,
        PRECISION=precision(x), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    pairs = zip(dweights, dbiases, strict=True)
    return [part for dweight, dbias in pairs for part in (dweight, dbias)[: 1 + has_bias]]


def forward_config(x: Tensor, N: int) -> Config:
    """chunk: rows of x; block: columns of y."""
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=2)
    widest = 64 if x.shape[-1] <= 64 else 128
    return Config(chunk=64, block=min(widest, padded(N)), num_warps=4, num_stages=3)


def weight_config(x: Tensor, N: int) -> Config:
    """chunk: rows of x and dy at a time; block: rows of the weights, of which there are N."""
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=2)
    if N <= 128:
        return Config(chunk=128, block=min(64, padded(N)), num_warps=4, num_stages=3)
    return Config(chunk=64, block=64, num_warps=4, num_stages=4)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.has_bias = inputs
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx: Any, dy: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = torch.ops.zoo.linear_backward(*ctx.saved_tensors, dy, ctx.has_bias)
    return dx, dweight, dbias.to(ctx.bias_dtype) if ctx.has_bias else None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
