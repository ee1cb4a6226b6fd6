"""Sum and norm in one pass over memory, both gradients in another.

Every tensor of the custom ops has the groups, streams with weights of their own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.gather_rows import gather_rows
from zoo.kernels.launch import Config, check_launch, configured, fold_batch, split_rows
from zoo.kernels.parts import sum_all
from zoo.kernels.residual_norm import kernels

# Programs: enough to keep the memory of a GPU busy, and, where each leaves sums of its own, not many more.
PROGRAMS = 4096
SUMMING_PROGRAMS = 2048


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    kind: str,
    eps: float,
    dtype: torch.dtype,
    lookup: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    check_launch("residual_norm", x, branch, weight)
    if x.numel() == 0:
        stream = x if branch is None else x + branch
        return stream if positions is None else stream[:, : positions.shape[1]], (x * weight).to(dtype)
    # Where there is none, any tensor stands in: it is not read.
    given = (x if branch is None else branch, weight, weight if bias is None else bias)
    rows, others = x.reshape(1, -1, x.shape[-1]), given[0].reshape(1, -1, x.shape[-1])
    asked = None if positions is None else positions[None]
    tokens, table = (None, None) if lookup is None else (lookup[0].reshape(1, -1), lookup[1].detach()[None])
    stream, normed, kept = torch.ops.zoo.residual_norm(
        rows,
        others,
        given[1][None],
        given[2][None],
        asked,
        tokens,
        table,
        branch is not None,
        bias is not None,
        kind == "rms",
        eps,
        dtype,
    )
    return stream.view(x.shape) if positions is None else kept.squeeze(0), normed.view(x.shape)


@torch.library.custom_op("zoo::residual_norm", mutates_args=())
def _forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    tokens: Tensor | None,
    table: Tensor | None,
    has_branch: bool,
    has_bias: bool,
    rms: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x and branch (groups, M, D), positions (groups, B, Q) with M = B T.

    With tokens (groups, M), x is not read, but their rows of the table (groups, V, D) are.
    The stream (groups, M, D), normed, and the stream at the positions (groups, B, Q, D); without any, no elements.
    """
    stream, normed = (x.new_empty(x.shape, dtype=each) for each in (x.dtype, dtype))
    given, looked_up = _rows(x, tokens, table)
    programs, launch = _launch(x, configured("residual_norm.forward", config_of, x), PROGRAMS)
    kernels.forward_kernel[(programs,)](
        *given, branch.contiguous(), weight.contiguous(), bias.contiguous(), stream, normed, eps=eps, **looked_up,
        BRANCH=has_branch, BIAS=has_bias, RMS=rms, **launch,
    )  # fmt: skip
    if positions is None:
        return stream, normed, stream.new_empty(len(stream), 0)
    sequences = positions.flatten(0, 1)
    kept = gather_rows(stream.view(len(sequences), -1, x.shape[2]), sequences, impl="triton")
    return stream, normed, kept.view(*positions.shape, -1)


@_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    tokens: Tensor | None,
    table: Tensor | None,
    has_branch: bool,
    has_bias: bool,
    rms: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (len(x), 0) if positions is None else (*positions.shape, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), x.new_empty(kept)


@torch.library.custom_op("zoo::residual_norm_backward", mutates_args=())
def _backward(
    stream: Tensor,
    weight: Tensor,
    dstream: Tensor | None,
    dnormed: Tensor,
    positions: Tensor | None,
    tokens: Tensor | None,
    table: Tensor | None,
    has_branch: bool,
    has_bias: bool,
    rms: bool,
    eps: float,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dstream (groups, M, D), or at positions (groups, B, Q, D). With tokens, the stream is rows of the table."""
    groups, M, D = stream.shape
    T, Q = (0, 1) if positions is None else (M // positions.shape[1], positions.shape[2])
    config = configured("residual_norm.backward", backward_config, stream)
    programs, launch = _launch(stream, config, SUMMING_PROGRAMS, T)
    dx, dbranch = (stream.new_empty(stream.shape, dtype=each) for each in (stream.dtype, branch_dtype))
    given, looked_up = _rows(stream, tokens, table)
    parts = [stream.new_empty(groups, programs // groups, D, dtype=torch.float32) for _ in range(1 + has_bias)]
    kernels.backward_kernel[(programs,)](
        *given, weight.contiguous(), stream if dstream is None else dstream.contiguous(), dnormed.contiguous(),
        stream if positions is None else positions.contiguous(), dx, dbranch, parts[0], parts[-1], T=T, Q=Q, eps=eps,
        **looked_up, STREAM=dstream is not None, ASKED=positions is not None, BRANCH=has_branch, BIAS=has_bias, RMS=rms,
        BLOCK_Q=min(64, triton.next_power_of_2(Q)), **launch,
    )  # fmt: skip
    dweight, *dbias = sum_all(parts, weight.dtype)
    return dx, dbranch, dweight, dbias[0] if has_bias else weight.new_empty(groups, 0)


@_backward.register_fake
def _(
    stream: Tensor,
    weight: Tensor,
    dstream: Tensor | None,
    dnormed: Tensor,
    positions: Tensor | None,
    tokens: Tensor | None,
    table: Tensor | None,
    has_branch: bool,
    has_bias: bool,
    rms: bool,
    eps: float,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dbranch = stream.new_empty(stream.shape), stream.new_empty(stream.shape, dtype=branch_dtype)
    dbias = weight.new_empty(len(weight), weight.shape[1] if has_bias else 0)
    return dx, dbranch, weight.new_empty(weight.shape), dbias


def config_of(x: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=4096, num_warps=4, num_stages=1)


def backward_config(x: Tensor) -> Config:
    """Programs of one warp: their sums need no barrier."""
    return Config(chunk=1, block=512, num_warps=1, num_stages=1)


def _launch(x: Tensor, config: Config, most: int, T: int = 0) -> tuple[int, dict[str, Any]]:
    """How many programs, and what every kernel is told of its work. T: blocks of rows must divide it, if not 0."""
    groups, M, D = x.shape
    block = triton.next_power_of_2(D)
    rows_of_block, steps, parts = split_rows(M, block, config, most // groups, T)
    sizes = {"M": M, "steps": steps, "parts": parts, "D": D, "BLOCK_D": block, "ROWS": rows_of_block}
    return groups * parts, {**sizes, "num_warps": config.num_warps}


def _rows(x: Tensor, tokens: Tensor | None, table: Tensor | None) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """What a kernel reads rows of, and the tokens, for which any tensor stands in; what it is told of both."""
    if tokens is None or table is None:
        x = x.contiguous()
        return (x, x), {"V": 0, "LOOKUP": False}
    return (table.contiguous(), tokens.contiguous()), {"V": table.shape[1], "LOOKUP": True}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, weight, _, positions, _, _, *ctx.options, _ = inputs
    ctx.branch_dtype, ctx.dtype = branch.dtype, output[1].dtype
    ctx.save_for_backward(output[0], weight, positions)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dstream: Tensor | None, dnormed: Tensor | None, dkept: Tensor | None
) -> tuple[Tensor | None, ...]:
    stream, weight, positions = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(stream, dtype=ctx.dtype)
    dx, dbranch, dweight, dbias = torch.ops.zoo.residual_norm_backward(
        stream,
        weight,
        dstream if positions is None else dkept,
        dnormed,
        positions,
        None,
        None,
        *ctx.options,
        ctx.branch_dtype,
    )
    has_branch, has_bias, *_ = ctx.options
    return dx, dbranch if has_branch else None, dweight, dbias if has_bias else None, *[None] * 8


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
