"""One launch; the gradients are those of the two ops.

Every tensor of the custom op has the groups, tables of their own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.launch import check_launch, fold_batch
from zoo.kernels.residual_norm.kernels import standardised
from zoo.kernels.residual_norm.triton import residual_norm  # noqa: F401 - the op of its gradient
from zoo.kernels.token_embedding.triton import gradient, sorted_places

# Elements of a program.
BLOCK = 2048


def embedding_norm(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    eps: float,
    dtype: torch.dtype,
    lookup: bool,
) -> tuple[Tensor, Tensor]:
    check_launch("embedding_norm", table, weight)
    # Without a bias the weight stands in for it, and is not read.
    shift = weight if bias is None else bias
    given = (tokens.reshape(1, -1), table[None], weight[None], shift[None])
    stream, normed = torch.ops.zoo.embedding_norm(*given, bias is not None, kind == "rms", eps, dtype, lookup)
    shape = (*tokens.shape, table.shape[1])
    return stream.view(shape), normed.view(shape)


@torch.library.custom_op("zoo::embedding_norm", mutates_args=())
def _forward(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    has_bias: bool,
    rms: bool,
    eps: float,
    dtype: torch.dtype,
    lookup: bool,
) -> tuple[Tensor, Tensor]:
    """tokens (groups, M), table (groups, V, D), weight and bias (groups, D)."""
    groups, V, D = table.shape
    M = tokens.shape[1]
    normed = table.new_empty(groups, M, D, dtype=dtype)
    # One number a group has the shape of all.
    stream = table.new_empty(groups, 1, 1).expand(groups, M, D) if lookup else table.new_empty(groups, M, D)
    block = triton.next_power_of_2(D)
    size = max(1, min(BLOCK // block, triton.next_power_of_2(max(1, M))))
    blocks = triton.cdiv(M, size)
    if blocks:
        forward_kernel[(groups * blocks,)](
            tokens.contiguous(), table.contiguous(), weight.contiguous(), bias.contiguous(), stream, normed,
            M, V, blocks, eps, STREAM=not lookup, BIAS=has_bias, RMS=rms, D=D, BLOCK_D=block, ROWS=size, num_warps=4,
        )  # fmt: skip
    return stream, normed


@_forward.register_fake
def _(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    has_bias: bool,
    rms: bool,
    eps: float,
    dtype: torch.dtype,
    lookup: bool,
) -> tuple[Tensor, Tensor]:
    stream = table.new_empty(*tokens.shape, table.shape[2])
    return stream, torch.empty_like(stream, dtype=dtype)


@kernel
def forward_kernel(
    tokens, table, weight, bias, stream, normed, M, V, blocks, eps,
    STREAM: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program ROWS tokens of a group."""
    wait_for_earlier()
    group = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (place < M)[:, None] & (column < D)[None, :]
    token = tl.load(tokens + group * M + place, mask=place < M, other=0)
    total = tl.load(table + (group * V + token)[:, None] * D + column[None, :], mask=mask, other=0.0)
    at = (group * M + place)[:, None] * D + column[None, :]
    if STREAM:
        tl.store(stream + at, total, mask=mask)
    unit, _ = standardised(total.to(tl.float32), column, eps, RMS, D)
    unit *= tl.load(weight + group * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        unit += tl.load(bias + group * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + at, unit.to(normed.dtype.element_ty), mask=mask)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, table, weight, _, ctx.has_bias, ctx.rms, ctx.eps, _, ctx.lookup = inputs
    ctx.places = sorted_places(tokens, table.shape[1])
    ctx.save_for_backward(tokens, table, weight, output[0])


def _gradients(ctx: Any, dstream: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    tokens, table, weight, stream = ctx.saved_tensors
    looked_up = (tokens, table) if ctx.lookup else (None, None)
    dx, _, dweight, dbias = torch.ops.zoo.residual_norm_backward(
        stream, weight, dstream, dnormed, None, *looked_up, False, ctx.has_bias, ctx.rms, ctx.eps, stream.dtype
    )
    return None, gradient(ctx.places, dx, table), dweight, dbias if ctx.has_bias else None, *[None] * 5


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
