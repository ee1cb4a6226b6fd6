"""One launch each way; the gradient of a stream of which few rows were asked is written once, zeros included."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.joined_rows import kernels
from zoo.kernels.launch import check_launch, fold_batch, padded, precision

ROWS = 16
BLOCK_T = 64


def joined_rows(x: Tensor, branch: Tensor, positions: Tensor) -> Tensor:
    check_launch("joined_rows", x, branch)
    return torch.ops.zoo.joined_rows(x, branch, positions)


@torch.library.custom_op("zoo::joined_rows", mutates_args=())
def _forward(x: Tensor, branch: Tensor, positions: Tensor) -> Tensor:
    B, T, D = x.shape
    Q = positions.shape[1]
    y = x.new_empty(B, Q, D)
    blocks = triton.cdiv(Q, ROWS)
    if y.numel():
        kernels.forward_kernel[(B * blocks,)](
            x.contiguous(), branch.contiguous(), positions.contiguous(), y, T, Q, blocks,
            D=D, BLOCK_D=triton.next_power_of_2(D), ROWS=ROWS,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(x: Tensor, branch: Tensor, positions: Tensor) -> Tensor:
    return x.new_empty(*positions.shape, x.shape[2])


@torch.library.custom_op("zoo::joined_rows_backward", mutates_args=())
def _backward(positions: Tensor, dy: Tensor, T: int, branch_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, Q, D = dy.shape
    dx, dbranch = dy.new_empty(B, T, D), dy.new_empty(B, T, D, dtype=branch_dtype)
    block_d = min(64, padded(D))
    t_blocks, d_blocks = triton.cdiv(T, BLOCK_T), triton.cdiv(D, block_d)
    if dx.numel():
        kernels.backward_kernel[(B * t_blocks * d_blocks,)](
            positions.contiguous(), dy.contiguous(), dx, dbranch, T, Q, t_blocks, d_blocks,
            D=D, BLOCK_D=block_d, BLOCK_T=BLOCK_T, BLOCK_Q=32 if Q > 16 else 16, PRECISION=precision(dy), num_warps=4,
        )  # fmt: skip
    return dx, dbranch


@_backward.register_fake
def _(positions: Tensor, dy: Tensor, T: int, branch_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, _, D = dy.shape
    return dy.new_empty(B, T, D), dy.new_empty(B, T, D, dtype=branch_dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, branch, positions = inputs
    ctx.T, ctx.branch_dtype = x.shape[1], branch.dtype
    ctx.save_for_backward(positions)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.zoo.joined_rows_backward(*ctx.saved_tensors, dy, ctx.T, ctx.branch_dtype), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
