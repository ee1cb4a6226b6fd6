"""One launch each way; the gradient of a stream of which few rows were asked is written once, zeros included."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.joined_rows import kernels
from zoo.kernels.launch import check_launch, fold_batch, rows

ROWS = 16
# Elements of a program of the backward pass.
ELEMENTS = 8192


def joined_rows(x: Tensor, branch: Tensor | None, positions: Tensor) -> Tensor:
    check_launch("joined_rows", x, branch)
    return torch.ops.zoo.joined_rows(x, branch, positions)


@torch.library.custom_op("zoo::joined_rows", mutates_args=())
def _forward(x: Tensor, branch: Tensor | None, positions: Tensor) -> Tensor:
    B, _, D = x.shape
    Q = positions.shape[1]
    y = x.new_empty(B, Q, D)
    blocks = triton.cdiv(Q, ROWS)
    given, others = rows(x), rows(x if branch is None else branch)
    if y.numel():
        kernels.forward_kernel[(B * blocks,)](
            given, others, positions.contiguous(), y, x.shape[1], Q, blocks, *given.stride()[:2], *others.stride()[:2],
            BRANCH=branch is not None, D=D, BLOCK_D=triton.next_power_of_2(D), ROWS=ROWS,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(x: Tensor, branch: Tensor | None, positions: Tensor) -> Tensor:
    return x.new_empty(*positions.shape, x.shape[2])


@torch.library.custom_op("zoo::joined_rows_backward", mutates_args=())
def _backward(positions: Tensor, dy: Tensor, T: int, branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the branch; without one, no elements."""
    B, Q, D = dy.shape
    dx, dbranch = dy.new_empty(B, T, D), dy.new_empty(B, 0 if branch_dtype is None else T, D, dtype=branch_dtype)
    block_d = min(256, triton.next_power_of_2(D))
    block_t = max(1, min(ELEMENTS // block_d, triton.next_power_of_2(T)))
    t_blocks, d_blocks = triton.cdiv(T, block_t), triton.cdiv(D, block_d)
    if dx.numel():
        kernels.backward_kernel[(B * t_blocks * d_blocks,)](
            positions.contiguous(), dy.contiguous(), dx, dbranch, T, Q, t_blocks, d_blocks,
            BRANCH=branch_dtype is not None, D=D, BLOCK_D=block_d, BLOCK_T=block_t,
            BLOCK_Q=min(64, triton.next_power_of_2(Q)), num_warps=4,
        )  # fmt: skip
    return dx, dbranch


@_backward.register_fake
def _(positions: Tensor, dy: Tensor, T: int, branch_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    B, _, D = dy.shape
    return dy.new_empty(B, T, D), dy.new_empty(B, 0 if branch_dtype is None else T, D, dtype=branch_dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    x, branch, positions = inputs
    ctx.T, ctx.branch_dtype = x.shape[1], None if branch is None else branch.dtype
    ctx.save_for_backward(positions)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
    dx, dbranch = torch.ops.zoo.joined_rows_backward(*ctx.saved_tensors, dy, ctx.T, ctx.branch_dtype)
    return dx, None if ctx.branch_dtype is None else dbranch, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
