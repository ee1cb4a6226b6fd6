"""All products in one pass over x, its gradient in another, the weights' in a third; wide inputs layer by layer.

Every tensor of the custom ops has the groups, each with weights of its own, as its first axis.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, padded, precision
from zoo.kernels.shifted_projections import kernels
from zoo.kernels.token_shift import token_shift

# Channels of x that a program can hold, with the sums of its gradient.
WIDEST = 128
# Programs that share the rows of the weights' gradient, for each block of columns: few enough to add up.
PROGRAMS = 48
PREPARED_ROWS = 32
FINISHED_COLUMNS = 16


def shifted_projections(x: Tensor, shares: Tensor, weights: list[Tensor], previous: Tensor | None) -> list[Tensor]:
    check_launch("shifted_projections", x, shares, previous, *weights)
    if x.shape[-1] > WIDEST or x.numel() == 0:
        mixed = token_shift(x, shares, previous=previous)
        return [F.linear(y, weight.to(y.dtype)) for y, weight in zip(mixed, weights, strict=True)]
    if previous is not None:
        x = torch.cat([previous.to(x.dtype)[:, None], x], dim=1)
    *ys, _ = torch.ops.zoo.shifted_projections(x[None], shares[None], [weight[None] for weight in weights])
    ys = [y.squeeze(0) for y in ys]
    return ys if previous is None else [y[:, 1:] for y in ys]


@torch.library.custom_op("zoo::shifted_projections", mutates_args=())
def _forward(x: Tensor, shares: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x (groups, B, T, K), shares (groups, n, K), weights (groups, N_i, K) -> each (groups, B, T, N_i), and what the
    gradients need of the weights."""
    x, shares = x.contiguous(), shares.contiguous()
    groups, B, T, K = x.shape
    sizes = _sizes(weights)
    prepared = x.new_empty(groups, 3, sizes["TOTAL"], K)
    row_blocks = triton.cdiv(max(sizes["NS"]), PREPARED_ROWS)
    kernels.prepare_kernel[(groups * len(weights) * row_blocks,)](
        shares, tuple(weights), prepared, *_strides(weights), row_blocks,
        **sizes, K=K, BLOCK_K=padded(K), ROWS=PREPARED_ROWS,
    )  # fmt: skip
    ys = [x.new_empty(groups, B, T, weight.shape[1]) for weight in weights]
    programs, row_blocks, options = _launch(x, sizes, configured("shifted_projections.forward", forward_config, x))
    kernels.forward_kernel[(programs,)](x, shares, prepared, tuple(ys), B * T, T, row_blocks, **options)
    return [*ys, prepared]


@_forward.register_fake
def _(x: Tensor, shares: Tensor, weights: list[Tensor]) -> list[Tensor]:
    groups, B, T, K = x.shape
    ys = [x.new_empty(groups, B, T, weight.shape[1]) for weight in weights]
    return [*ys, x.new_empty(groups, 3, sum(w.shape[1] for w in weights), K)]


@torch.library.custom_op("zoo::shifted_projections_backward", mutates_args=())
def _backward(
    x: Tensor, shares: Tensor, weights: list[Tensor], prepared: Tensor, dys: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, shares, dys = x.contiguous(), shares.contiguous(), [dy.contiguous() for dy in dys]
    groups, B, T, K = x.shape
    M, sizes = B * T, _sizes(weights)
    dx, dshares, dweights = torch.empty_like(x), torch.empty_like(shares), [torch.empty_like(w) for w in weights]
    programs, row_blocks, options = _launch(x, sizes, configured("shifted_projections.input", input_config, x))
    kernels.input_kernel[(programs,)](prepared, tuple(dys), dx, M, T, row_blocks, **options)

    config = configured("shifted_projections.weights", weight_config, x)
    _, row_blocks, options = _launch(x, sizes, config)
    steps = triton.cdiv(row_blocks, max(1, PROGRAMS // groups))
    parts = triton.cdiv(row_blocks, steps)
    sums = torch.empty(groups, parts, 2, sizes["TOTAL"], K, dtype=torch.float32, device=x.device)
    kernels.weight_kernel[(groups * parts * options["BLOCKS"],)](x, tuple(dys), sums, M, T, steps, parts, **options)
    k_blocks = triton.cdiv(K, FINISHED_COLUMNS)
    kernels.finish_kernel[(groups * len(dys) * k_blocks,)](
        prepared, shares, sums, tuple(dweights), dshares, *_strides(dweights), parts, k_blocks,
        **sizes, K=K, COLUMNS=FINISHED_COLUMNS, ROWS=128,
    )  # fmt: skip
    return dx, dshares, dweights


@_backward.register_fake
def _(
    x: Tensor, shares: Tensor, weights: list[Tensor], prepared: Tensor, dys: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return x.new_empty(x.shape), shares.new_empty(shares.shape), [torch.empty_like(weight) for weight in weights]


def forward_config(x: Tensor) -> Config:
    """chunk: rows of a program; block: columns of a result that it makes at a time."""
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=8, num_stages=1)
    return Config(chunk=64, block=64, num_warps=4, num_stages=3)


def input_config(x: Tensor) -> Config:
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=1)
    return Config(chunk=128, block=32, num_warps=8, num_stages=3)


def weight_config(x: Tensor) -> Config:
    """chunk: rows that a program takes at a time; block: rows of a weight."""
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=1)
    return Config(chunk=64, block=64, num_warps=8, num_stages=3)


def _sizes(weights: list[Tensor]) -> dict[str, Any]:
    """Of weights (groups, N_i, K): each N_i, where it starts among all, and how many there are."""
    sizes = tuple(weight.shape[-2] for weight in weights)
    *starts, total = accumulate(sizes, initial=0)
    return {"NS": sizes, "STARTS": tuple(starts), "TOTAL": total, "COUNT": len(sizes)}


def _strides(weights: list[Tensor]) -> list[tuple[int, ...]]:
    """Over groups, rows and columns, each of all weights."""
    return list(zip(*(weight.stride() for weight in weights), strict=True))


def _launch(x: Tensor, sizes: dict[str, Any], config: Config) -> tuple[int, int, dict[str, Any]]:
    """How many programs, blocks of rows of a group, and options."""
    groups, B, T, K = x.shape
    row_blocks = triton.cdiv(B * T, config.chunk)
    block = min(config.block, padded(max(sizes["NS"])))
    options = {"BLOCK": block, "BLOCKS": sum(triton.cdiv(N, block) for N in sizes["NS"]), "K": K, "BLOCK_K": padded(K)}
    options |= {"ROWS": config.chunk, "STAGES": config.num_stages, "PRECISION": precision(x)}
    return groups * row_blocks, row_blocks, sizes | options | {"num_warps": config.num_warps}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, shares, weights = inputs
    ctx.save_for_backward(x, shares, output[-1], *weights)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, slopes: list[Tensor | None]) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, shares, prepared, *weights = ctx.saved_tensors
    given = zip(slopes[:-1], weights, strict=True)
    dys = [x.new_zeros(*x.shape[:3], weight.shape[1]) if dy is None else dy for dy, weight in given]
    return torch.ops.zoo.shifted_projections_backward(x, shares, weights, prepared, dys)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
