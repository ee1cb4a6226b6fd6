"""The fused products, one launch each way but for the weights' gradients; wide ones product by product.

Every tensor of the custom ops has the groups, layers with weights of their own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.launch import Config, cast, check_launch, configured, fold_batch, padded, precision, rows
from zoo.kernels.linear.triton import weight_gradients
from zoo.kernels.selective_inputs import kernels
from zoo.kernels.streams import join, lane

# Numbers a token between the two products that a program can hold.
WIDEST = 128
# Rows of them start at 32 bytes: products of others take several times as long.
WIDTH = 16


def selective_inputs(x: Tensor, weight: Tensor, dt_weight: Tensor) -> list[Tensor]:
    check_launch("selective_inputs", x, weight, dt_weight)
    results = _SelectiveInputs.apply(x.reshape(1, -1, x.shape[-1]), weight[None], dt_weight[None])
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results[:4]]


class _SelectiveInputs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, ...]:
        y, dt, *given = torch.ops.zoo.selective_inputs(x, weight, dt_weight)
        R, N = _sizes(weight, dt_weight)
        r, B, C, _ = y.split([R, N, N, y.shape[-1] - R - 2 * N], dim=-1)
        return x.view_as(x), dt, B, C, r, *given

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[4:])
        # Else torch makes zeros for r and the weights' copies too.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[4:])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor, ...]:
        x, weight, dt_weight, *_ = ctx.saved_tensors
        D, (_, N) = x.shape[-1], _sizes(weight, dt_weight)
        pairs = zip(slopes, (D, D, N, N), strict=False)
        given = [x.new_zeros(*x.shape[:-1], size) if slope is None else slope for slope, size in pairs]
        return torch.ops.zoo.selective_inputs_backward(*ctx.saved_tensors, *given)


@torch.library.custom_op("zoo::selective_inputs", mutates_args=())
def _forward(x: Tensor, weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (groups, M, D). y = weight x, with columns up to a multiple of WIDTH, dt; the weights as `cast` gives them."""
    kept, kept_dt = cast(weight, x.dtype), cast(dt_weight, x.dtype)
    x, matrix, dt_matrix = rows(x), *_matrices(weight, dt_weight, kept, kept_dt)
    groups, M, D = x.shape
    if _wide(x, weight):
        y = F.pad(torch.bmm(x, matrix.mT), (0, -weight.shape[1] % WIDTH))
        return y, torch.bmm(y[..., : dt_weight.shape[2]], dt_matrix.mT), kept, kept_dt
    programs, options = _launch(x, weight, dt_weight, configured("selective_inputs.forward", config_of, x))
    y, dt = x.new_empty(groups, M, options["WIDTH"]), x.new_empty(groups, M, D)
    kernels.forward_kernel[(programs,)](
        x, matrix, dt_matrix, y, dt, M, D, *x.stride()[:2], programs // groups, **options
    )  # fmt: skip
    return y, dt, kept, kept_dt


@_forward.register_fake
def _(x: Tensor, weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = weight.shape[1]
    y = x.new_empty(*x.shape[:2], N + -N % WIDTH)
    return y, x.new_empty(x.shape), cast(weight, x.dtype), cast(dt_weight, x.dtype)


@torch.library.custom_op("zoo::selective_inputs_backward", mutates_args=())
def _backward(
    x: Tensor,
    weight: Tensor,
    dt_weight: Tensor,
    r: Tensor,
    kept: Tensor,
    kept_dt: Tensor,
    dx: Tensor,
    ddt: Tensor,
    dB: Tensor,
    dC: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and dt_weight from those of x, dt, B and C that are returned."""
    x, r = rows(x), rows(r)
    matrix, dt_matrix = _matrices(weight, dt_weight, kept, kept_dt)
    dx, ddt, dB, dC = (slope.contiguous() for slope in (dx, ddt, dB, dC))
    groups, M, D = x.shape
    R, N = _sizes(weight, dt_weight)
    with lane(x, "weights"):
        (ddt_weight,) = weight_gradients(r, [ddt], False, dt_weight.dtype)
    if _wide(x, weight):
        dy = torch.cat([torch.bmm(ddt, dt_matrix), dB, dC], dim=-1)
        total = torch.baddbmm(dx, dy, matrix)
    else:
        programs, options = _launch(x, weight, dt_weight, configured("selective_inputs.input", config_of, x))
        dy, total = x.new_empty(groups, M, options["WIDTH"]), torch.empty_like(dx)
        kernels.input_kernel[(programs,)](
            dx, ddt, dB, dC, matrix, dt_matrix, total, dy, M, D, programs // groups, STATES=N, **options
        )  # fmt: skip
    (dweight,) = weight_gradients(x, [dy], False, weight.dtype)
    join(x, "weights")
    return total, dweight[:, : R + 2 * N], ddt_weight


@_backward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    dt_weight: Tensor,
    r: Tensor,
    kept: Tensor,
    kept_dt: Tensor,
    dx: Tensor,
    ddt: Tensor,
    dB: Tensor,
    dC: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dt_weight.new_empty(dt_weight.shape)


fold_batch(_forward)
fold_batch(_backward)


def config_of(x: Tensor) -> Config:
    """Both ways. chunk: rows of x; block: channels of it at a time."""
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=1)
    return Config(chunk=64, block=64, num_warps=4, num_stages=3)


def _sizes(weight: Tensor, dt_weight: Tensor) -> tuple[int, int]:
    """R and N, of (groups, R + 2 N, D) and (groups, D, R)."""
    R = dt_weight.shape[2]
    return R, (weight.shape[1] - R) // 2


def _wide(x: Tensor, weight: Tensor) -> bool:
    return weight.shape[1] > WIDEST or x.numel() == 0


def _matrices(weight: Tensor, dt_weight: Tensor, kept: Tensor, kept_dt: Tensor) -> list[Tensor]:
    pairs = ((kept, weight), (kept_dt, dt_weight))
    return [(given if given.numel() else matrix).contiguous() for given, matrix in pairs]


def _launch(x: Tensor, weight: Tensor, dt_weight: Tensor, config: Config) -> tuple[int, dict[str, Any]]:
    """How many programs, and what both kernels are told."""
    groups, M, _ = x.shape
    N = weight.shape[1]
    options: dict[str, Any] = {"R": dt_weight.shape[2], "N": N, "BLOCK_N": padded(N), "WIDTH": N + -N % WIDTH}
    options |= {"ROWS": config.chunk, "BLOCK": config.block, "STAGES": config.num_stages, "PRECISION": precision(x)}
    return groups * triton.cdiv(M, config.chunk), options | {"num_warps": config.num_warps}
