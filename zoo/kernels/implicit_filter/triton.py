"""All layers in one launch; their gradients in another, and one that adds up what its programs leave.

Every tensor of the custom ops has the groups, filters of their own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.implicit_filter import WIDEST, kernels
from zoo.kernels.launch import check_launch, fold_batch, padded, precision
from zoo.kernels.parts import sum_all

BLOCK = 32


def implicit_filter(
    positions: Tensor, window: Tensor, layers: tuple[Tensor, ...], frequency: Tensor, out_weight: Tensor, length: int
) -> Tensor:
    check_launch("implicit_filter", positions, window, *layers, frequency, out_weight)
    if len(frequency) > WIDEST:
        raise UnsupportedError(
            f"implicit_filter: the Triton backend holds up to {WIDEST} hidden units, not {len(frequency)}; "
            "pass impl='chunked'."
        )
    groups = [x[None] for x in (positions, window, *layers, frequency, out_weight)]
    return torch.ops.zoo.implicit_filter(groups[:2], groups[2:], length).squeeze(0)


@torch.library.custom_op("zoo::implicit_filter", mutates_args=())
def _forward(constants: list[Tensor], parameters: list[Tensor], length: int) -> Tensor:
    """constants: positions and window; parameters: layers, frequency, out_weight; as above, groups first."""
    groups, D = len(parameters[0]), parameters[-1].shape[1]
    h = parameters[0].new_empty(groups, D, length)
    given, blocks, options = _prepared(constants, parameters, length)
    kernels.forward_kernel[(groups * blocks,)](*given, h, constants[0].shape[1], length, blocks, **options)
    return h


@_forward.register_fake
def _(constants: list[Tensor], parameters: list[Tensor], length: int) -> Tensor:
    return parameters[0].new_empty(len(parameters[0]), parameters[-1].shape[1], length)


@torch.library.custom_op("zoo::implicit_filter_backward", mutates_args=())
def _backward(constants: list[Tensor], parameters: list[Tensor], dh: Tensor) -> list[Tensor]:
    groups, length = len(dh), dh.shape[2]
    given, blocks, options = _prepared(constants, parameters, length)
    parts = [p.new_empty(groups, blocks, *p.shape[1:]) for p in parameters]
    kernels.backward_kernel[(groups * blocks,)](
        *given, dh.contiguous(), *parts, constants[0].shape[1], length, blocks, **options
    )
    return sum_all(parts, dh.dtype)


@_backward.register_fake
def _(constants: list[Tensor], parameters: list[Tensor], dh: Tensor) -> list[Tensor]:
    return [p.new_empty(p.shape) for p in parameters]


def _prepared(
    constants: list[Tensor], parameters: list[Tensor], length: int
) -> tuple[list[Tensor], int, dict[str, Any]]:
    """The inputs of both kernels, blocks of taps, and options."""
    N, F = parameters[0].shape[1:]
    D = parameters[-1].shape[1]
    options: dict[str, Any] = {
        "F": F,
        "N": N,
        "D": D,
        "BLOCK_F": padded(F),
        "BLOCK_N": padded(N),
        "BLOCK_D": min(64, padded(D)),
    }
    options |= {"BLOCK": BLOCK, "PRECISION": precision(parameters[0]), "num_warps": 4}
    return [x.contiguous() for x in (*constants, *parameters)], triton.cdiv(length, BLOCK), options


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    constants, parameters, _ = inputs
    ctx.save_for_backward(*constants, *parameters)


def _gradients(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    return [None, None], torch.ops.zoo.implicit_filter_backward(tensors[:2], tensors[2:], dh), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
