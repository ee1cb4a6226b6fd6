"""One launch each way; the gradient of what few rows were asked of is written once, zeros included."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.gather_rows import kernels
from zoo.kernels.launch import check_launch, fold_batch, rows

ROWS = 16
# Elements of a program of the backward pass.
ELEMENTS = 8192


def gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    check_launch("gather_rows", x)
    return torch.ops.zoo.gather_rows(x, positions)


@torch.library.custom_op("zoo::gather_rows", mutates_args=())
def _forward(x: Tensor, positions: Tensor) -> Tensor:
    B, _, D = x.shape
    Q = positions.shape[1]
    y = x.new_empty(B, Q, D)
    blocks = triton.cdiv(Q, ROWS)
    x = rows(x)
    if y.numel():
        kernels.forward_kernel[(B * blocks,)](
            x, positions.contiguous(), y, Q, blocks, *x.stride()[:2],
            D=D, BLOCK_D=triton.next_power_of_2(D), ROWS=ROWS,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(x: Tensor, positions: Tensor) -> Tensor:
    return x.new_empty(*positions.shape, x.shape[2])


@torch.library.custom_op("zoo::gather_rows_backward", mutates_args=())
def _backward(positions: Tensor, dy: Tensor, T: int) -> Tensor:
    B, Q, D = dy.shape
    dx = dy.new_empty(B, T, D)
    block_d = min(256, triton.next_power_of_2(D))
    block_t = max(1, min(ELEMENTS // block_d, triton.next_power_of_2(T)))
    t_blocks, d_blocks = triton.cdiv(T, block_t), triton.cdiv(D, block_d)
    if dx.numel():
        kernels.backward_kernel[(B * t_blocks * d_blocks,)](
            positions.contiguous(), dy.contiguous(), dx, T, Q, t_blocks, d_blocks,
            D=D, BLOCK_D=block_d, BLOCK_T=block_t, BLOCK_Q=min(64, triton.next_power_of_2(Q)), num_warps=4,
        )  # fmt: skip
    return dx


@_backward.register_fake
def _(positions: Tensor, dy: Tensor, T: int) -> Tensor:
    B, _, D = dy.shape
    return dy.new_empty(B, T, D)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, positions = inputs
    ctx.T = x.shape[1]
    ctx.save_for_backward(positions)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return torch.ops.zoo.gather_rows_backward(*ctx.saved_tensors, dy, ctx.T), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
