"""Lookups, and one launch for all gradients.

autograd would write the gradient of the rows as one of the whole tensor, mostly zeros, and add it in another pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.gather_rows import gather_rows
from zoo.kernels.kept_rows import kernels
from zoo.kernels.launch import check_launch, fold_batch

# Elements of a program.
ELEMENTS = 4096


def kept_rows(positions: Tensor, xs: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    check_launch("kept_rows", *xs)
    results = _KeptRows.apply(positions, *xs)
    return results[: len(xs)], results[len(xs) :]


class _KeptRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(positions: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        return (*(x.view_as(x) for x in xs), *(gather_rows(x, positions, impl="triton") for x in xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        half = len(slopes) // 2
        return None, *torch.ops.zoo.kept_rows_backward(*ctx.saved_tensors, slopes[:half], slopes[half:])


@torch.library.custom_op("zoo::kept_rows_backward", mutates_args=())
def _backward(positions: Tensor, dxs: list[Tensor], drows: list[Tensor]) -> list[Tensor]:
    dxs, drows = [dx.contiguous() for dx in dxs], [dy.contiguous() for dy in drows]
    outs = [torch.empty_like(dx) for dx in dxs]
    B, T, D = dxs[0].shape
    Q, block_d = positions.shape[1], triton.next_power_of_2(D)
    block_t = max(1, min(ELEMENTS // block_d, triton.next_power_of_2(T)))
    blocks = triton.cdiv(T, block_t)
    if outs[0].numel():
        kernels.add_kernel[(B * blocks,)](
            positions.contiguous(), tuple(dxs), tuple(drows), tuple(outs), T, Q, blocks,
            COUNT=len(outs), D=D, BLOCK_D=block_d, BLOCK_T=block_t, BLOCK_Q=min(64, triton.next_power_of_2(max(1, Q))),
        )  # fmt: skip
    return outs


@_backward.register_fake
def _(positions: Tensor, dxs: list[Tensor], drows: list[Tensor]) -> list[Tensor]:
    return [dx.new_empty(dx.shape) for dx in dxs]


fold_batch(_backward)
