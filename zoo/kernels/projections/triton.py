"""All products in one pass over x, its gradient in another; inputs wider than WIDEST product by product.

Every tensor of the custom op has the groups, each with weights of its own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, padded, precision, rows
from zoo.kernels.linear.triton import weight_gradients
from zoo.kernels.projections import kernels
from zoo.kernels.streams import join, lane

# Channels of x that a program can hold, with the sums of its gradient.
WIDEST = 128
CAST = 4096
# Products in half precision are several times slower where rows do not start at 32 bytes.
WIDTH = 16


def projections(x: Tensor, weights: list[Tensor], biases: list[Tensor] | list[None]) -> list[Tensor]:
    check_launch("projections", x, *weights, *biases)
    given = [bias[None] for bias in biases if bias is not None]
    results = torch.ops.zoo.projections(x.reshape(1, -1, x.shape[-1]), [weight[None] for weight in weights], given)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results[: len(weights)]]


@torch.library.custom_op("zoo::projections", mutates_args=())
def _forward(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """x (groups, M, K), weights (groups, N_i, K), biases none, or each (groups, N_i).

    All y, and then the weights in x's dtype, for the backward pass; if they have it already, no elements.
    """
    kept = _cast(weights, x.dtype)
    given = [w if w.numel() else weight for w, weight in zip(kept, weights, strict=True)]
    if x.shape[2] > WIDEST:
        ys = [torch.bmm(x, _widened(w, 1).mT)[..., : w.shape[1]] for w in given]
        if biases:
            ys = [y + bias[:, None].to(y.dtype) for y, bias in zip(ys, biases, strict=True)]
        return ys + kept
    x, ys = rows(x), [x.new_empty(*x.shape[:2], weight.shape[1]) for weight in weights]
    programs, matrices, arguments, options = _prepared(x, given, configured("projections.forward", forward_config, x))
    # Without biases the weights stand in for them, and are not read.
    shifts = tuple(rows(bias) for bias in biases) or matrices
    weight_groups, row_blocks = arguments
    kernels.forward_kernel[(programs,)](
        x, matrices, shifts, tuple(ys), x.shape[1], *x.stride()[:2], weight_groups,
        tuple(shift.stride(0) for shift in shifts), row_blocks, BIAS=bool(biases), **options,
    )  # fmt: skip
    return ys + kept


@_forward.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    ys = [x.new_empty(*x.shape[:2], weight.shape[1]) for weight in weights]
    return ys + [weight.new_empty(_cast_shape(weights, weight, x.dtype), dtype=x.dtype) for weight in weights]


@torch.library.custom_op("zoo::projections_backward", mutates_args=())
def _backward(
    x: Tensor, weights: list[Tensor], dys: list[Tensor], has_biases: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx, and the other gradients in fp32; the weights are in x's dtype."""
    x, dys = rows(x), [dy.contiguous() for dy in dys]
    with lane(x, "weights"):
        sums = weight_gradients(x, dys, has_biases, torch.float32)
    dx = _input_gradient(x, weights, dys)
    join(x, "weights")
    return dx, sums[:: 1 + has_biases], sums[1::2] if has_biases else []


@_backward.register_fake
def _(
    x: Tensor, weights: list[Tensor], dys: list[Tensor], has_biases: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dweights = [weight.new_empty(weight.shape, dtype=torch.float32) for weight in weights]
    dbiases = [weight.new_empty(weight.shape[:2], dtype=torch.float32) for weight in weights if has_biases]
    return x.new_empty(x.shape), dweights, dbiases


def _input_gradient(x: Tensor, weights: list[Tensor], dys: list[Tensor]) -> Tensor:
    if x.shape[2] > WIDEST:
        pairs = [(_widened(dy, 2), _widened(w, 1)) for dy, w in zip(dys, weights, strict=True)]
        dx = torch.bmm(*pairs[0])
        for pair in pairs[1:]:
            dx.baddbmm_(*pair)
        return dx
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    programs, given, arguments, options = _prepared(x, weights, configured("projections.input", input_config, x))
    kernels.input_kernel[(programs,)](tuple(dys), given, dx, x.shape[1], *arguments, **options)
    return dx


def forward_config(x: Tensor) -> Config:
    """chunk: rows of x; block: columns of a result that a program makes at a time."""
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=1)
    return Config(chunk=128, block=64, num_warps=8, num_stages=3)


def input_config(x: Tensor) -> Config:
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=1)
    return Config(chunk=128, block=32, num_warps=4, num_stages=3)


def _cast(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All weights (groups, N_i, K) in `dtype`, contiguous, by one launch; if they have it already, no elements."""
    outs = [weight.new_empty(_cast_shape(weights, weight, dtype), dtype=dtype) for weight in weights]
    if outs[0].numel():
        groups, _, K = weights[0].shape
        weights = [weight if weight.stride()[1:] == (K, 1) else weight.contiguous() for weight in weights]
        sizes = tuple(weight[0].numel() for weight in weights)
        kernels.cast_kernel[(groups * sum(triton.cdiv(size, CAST) for size in sizes),)](
            tuple(weights), tuple(outs), tuple(weight.stride(0) for weight in weights), sizes, groups,
            COUNT=len(weights), BLOCK=CAST,
        )  # fmt: skip
    return outs


def _cast_shape(weights: list[Tensor], weight: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    return (len(weight), 0) if all(w.dtype == dtype for w in weights) else tuple(weight.shape)


def _prepared(
    x: Tensor, weights: list[Tensor], config: Config
) -> tuple[int, tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]]:
    """How many programs; the weights as kernels take them, their strides over groups and blocks of rows; options."""
    groups, M, K = x.shape
    weights = [weight.contiguous() for weight in weights]
    row_blocks = triton.cdiv(M, config.chunk)
    sizes = tuple(weight.shape[1] for weight in weights)
    options = {"NS": sizes, "BLOCKS": tuple(min(config.block, padded(N)) for N in sizes), "COUNT": len(weights)}
    options |= {"K": K, "BLOCK_K": padded(K), "ROWS": config.chunk}
    options |= {"STAGES": config.num_stages, "PRECISION": precision(x)}
    arguments = (tuple(weight.stride(0) for weight in weights), row_blocks)
    return groups * row_blocks, tuple(weights), arguments, options | {"num_warps": config.num_warps}


def _widened(x: Tensor, axis: int) -> Tensor:
    """x with zeros up to a multiple of WIDTH along an axis."""
    short = -x.shape[axis] % WIDTH
    return F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, short)) if short else x


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases = inputs
    ctx.dtypes = [weight.dtype for weight in weights], [bias.dtype for bias in biases]
    # Of zeros for what has no gradient.
    ctx.set_materialize_grads(False)
    kept = output[len(weights) :]
    ctx.save_for_backward(x, *(w if w.numel() else weight for w, weight in zip(kept, weights, strict=True)))


def _gradients(ctx: Any, dys: list[Tensor | None]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, *weights = ctx.saved_tensors
    dys = dys[: len(weights)]
    slopes = [x.new_zeros(*x.shape[:2], w.shape[1]) if dy is None else dy for dy, w in zip(dys, weights, strict=True)]
    dx, *sums = torch.ops.zoo.projections_backward(x, weights, slopes, bool(ctx.dtypes[1]))
    pairs = (zip(each, dtypes, strict=True) for each, dtypes in zip(sums, ctx.dtypes, strict=True))
    dweights, dbiases = ([total.to(dtype) for total, dtype in each] for each in pairs)
    return dx, dweights, dbiases


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
