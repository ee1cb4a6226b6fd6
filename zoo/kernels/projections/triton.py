"""A product for each layer; in the gradient of x, each product adds to the ones before.

Every tensor of the custom op has the groups, each with weights of its own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.launch import check_launch, fold_batch, rows
from zoo.kernels.linear.triton import weight_gradient

# Products in half precision are several times slower where rows do not start at 32 bytes.
WIDTH = 16


def projections(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    check_launch("projections", x, *weights)
    results = torch.ops.zoo.projections(x.reshape(1, -1, x.shape[-1]), [weight[None] for weight in weights])
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]


@torch.library.custom_op("zoo::projections", mutates_args=())
def _forward(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x (groups, M, K), weights (groups, N_i, K)."""
    return [torch.bmm(x, _widened(weight.to(x.dtype), 1).mT)[..., : weight.shape[1]] for weight in weights]


@_forward.register_fake
def _(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:2], weight.shape[1]) for weight in weights]


@torch.library.custom_op("zoo::projections_backward", mutates_args=())
def _backward(x: Tensor, weights: list[Tensor], dys: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    x, dys = rows(x), [dy.contiguous() for dy in dys]
    dx = None
    for dy, weight in zip(dys, weights, strict=True):
        factors = _widened(dy, 2), _widened(weight.to(x.dtype), 1)
        dx = torch.bmm(*factors) if dx is None else dx.baddbmm_(*factors)
    dweights = [weight_gradient(x, dy)[0].to(weight.dtype) for dy, weight in zip(dys, weights, strict=True)]
    return torch.zeros_like(x) if dx is None else dx, dweights


@_backward.register_fake
def _(x: Tensor, weights: list[Tensor], dys: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape), [weight.new_empty(weight.shape) for weight in weights]


def _widened(x: Tensor, axis: int) -> Tensor:
    """x with zeros up to a multiple of WIDTH along an axis."""
    short = -x.shape[axis] % WIDTH
    return F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, short)) if short else x


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights = inputs
    ctx.save_for_backward(x, *weights)


def _gradients(ctx: Any, dys: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    x, *weights = ctx.saved_tensors
    slopes = [x.new_zeros(*x.shape[:2], w.shape[1]) if dy is None else dy for dy, w in zip(dys, weights, strict=True)]
    return torch.ops.zoo.projections_backward(x, weights, slopes)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
