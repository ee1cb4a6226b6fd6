"""The fused scan: each way one launch that reads every input once and keeps one state a chunk in memory.

Every tensor of the custom ops has the batch, or the groups that divide the batch evenly and have their own A, D and
other parameters, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.launch import Config, check_launch, configured, fold_batch, rows
from zoo.kernels.parts import sum_parts
from zoo.kernels.selective_scan import kernels

# Threads of a warp side by side over channels; the others share a channel's states. More make the sums over states
# cheaper, and those over channels, which only the backward has, dearer.
FORWARD_LANES, BACKWARD_LANES = 16, 8
LARGEST_STATE = 256


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    check_launch("selective_scan", x, dt, A, B, C, D, z)
    if A.shape[1] > LARGEST_STATE:
        raise UnsupportedError(
            f"selective_scan: N = {A.shape[1]}; the Triton backend has up to {LARGEST_STATE} states a channel. "
            "Pass impl='chunked'."
        )
    by_step = [tensor.shape[:2] == x.shape[:2] and tensor.dim() == 3 for tensor in (dt, B, C)]
    dt, B, C = (M if steps else M[None] for M, steps in zip((dt, B, C), by_step, strict=True))
    if initial_state is not None:
        initial_state = initial_state.float()
    y, last, _ = torch.ops.zoo.selective_scan(
        x, dt, A[None], B, C, None if D is None else D[None], z, initial_state, by_step, return_state,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return y, last if return_state else None


@torch.library.custom_op("zoo::selective_scan", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    by_step: list[bool],
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state and, to `keep` for the backward, states between chunks: (B, chunks, D, N).

    A, D and, of dt, B and C, those that are not `by_step` have groups as their first axis.
    """
    batch, T, channels = x.shape
    config = configured("selective_scan.forward", config_of, A.shape[2], FORWARD_LANES)
    tensors, strides, options = _prepared(x, dt, A, B, C, D, z, by_step, FORWARD_LANES, config)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last, kept = (
        torch.empty(shape, dtype=torch.float32, device=x.device) for shape in _state_shapes(x, A, return_state, keep)
    )
    first = x if initial_state is None else initial_state.contiguous()
    kernels.forward_kernel[(batch * triton.cdiv(channels, config.block),)](
        *tensors, first, y, last, kept, T, batch // len(A), *strides, **options,
        HAS_FIRST=initial_state is not None, HAS_LAST=return_state, KEEP=keep,
    )  # fmt: skip
    return y, last, kept


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    by_step: list[bool],
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    last, kept = (x.new_empty(shape, dtype=torch.float32) for shape in _state_shapes(x, A, return_state, keep))
    return x.new_empty(x.shape), last, kept


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    by_step: list[bool],
    has_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, dt, A, B, C, D, z and the initial state; those without an input have no elements."""
    batch, T, channels = x.shape
    groups, _, N = A.shape
    config = configured("selective_scan.forward", config_of, A.shape[2], BACKWARD_LANES)
    tensors, strides, options = _prepared(x, dt, A, B, C, D, z, by_step, BACKWARD_LANES, config)
    blocks = triton.cdiv(channels, config.block)
    dy = rows(dy)
    dx, dz = _empty_like(x, x), _empty_like(z, x)

    def parts(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    dA = parts(batch, channels, N)
    ddt = _empty_like(dt, x) if by_step[0] else parts(batch, channels)
    dB, dC = (parts(blocks, batch, T, N) if steps else parts(batch, channels, N) for steps in by_step[1:])
    dD = _empty_like(None, x) if D is None else parts(batch, channels)
    dfirst = parts(batch, channels, N) if has_first else parts(batch, 0)
    kernels.backward_kernel[(batch * blocks,)](
        *tensors, kept, dy, x if dlast is None else dlast.contiguous(), dx, ddt, dA, dB, dC, dD, dz, dfirst,
        T, batch // groups, batch * T * N, *strides, dy.stride(0), dy_t=dy.stride(1), **options,
        HAS_FIRST=has_first, HAS_LAST=dlast is not None,
    )  # fmt: skip

    def over_group(part: Tensor, like: Tensor) -> Tensor:
        return sum_parts(part.unflatten(0, (groups, -1)), like.dtype)

    ddt = ddt if by_step[0] else over_group(ddt, dt)
    dB, dC = (
        sum_parts(part[None], M.dtype).squeeze(0) if steps else over_group(part, M)
        for part, M, steps in ((dB, B, by_step[1]), (dC, C, by_step[2]))
    )
    return dx, ddt, over_group(dA, A), dB, dC, dD if D is None else over_group(dD, D), dz, dfirst


@_backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    by_step: list[bool],
    has_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[2], A.shape[2]) if has_first else (x.shape[0], 0)
    gradients = [_empty_like(M, x) for M in (x, dt, A, B, C, D, z)]
    return (*gradients, x.new_empty(shape, dtype=torch.float32))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], output[2])
    ctx.has_first = inputs[7] is not None
    ctx.by_step, ctx.return_state = inputs[8], inputs[9]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    gradients = torch.ops.zoo.selective_scan_backward(
        *tensors, kept, dy, dlast if ctx.return_state else None, ctx.by_step, ctx.has_first
    )
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def config_of(N: int, lanes: int) -> Config:
    """chunk: steps whose states the backward holds in registers; block: channels. About 16 states a thread.

    Comparisons are all that a symbolic N is put to.
    """
    num_warps = 1 if N <= 64 else 4
    rows = next(rows for rows in (4, 2, 1) if rows == 1 or rows * lanes * N <= 16 * 32 * num_warps)
    return Config(chunk=4 if N <= 64 else 2, block=lanes * rows, num_warps=num_warps, num_stages=1)


def _prepared(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    by_step: list[bool],
    lanes: int,
    config: Config,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """The inputs of both kernels, their strides over batch and time, and options."""
    x = rows(x)
    z = x if z is None else rows(z)
    dt, B, C = (rows(M) if steps else M.contiguous() for M, steps in zip((dt, B, C), by_step, strict=True))
    n = triton.next_power_of_2(A.shape[2])
    threads = min(n, 32 * config.num_warps // lanes)
    options = {"D": x.shape[2], "N": A.shape[2], "NT": threads}
    options |= {"NI": min(4, n // threads), "NK": max(1, n // (4 * threads))}
    options |= {"ROWS": config.block // lanes, "LANES": lanes, "S": config.chunk}
    options |= {"DT_BY_STEP": by_step[0], "B_BY_STEP": by_step[1], "C_BY_STEP": by_step[2]}
    options |= {"HAS_SKIP": D is not None, "HAS_GATE": z is not x}
    strides = tuple(M.stride(0) for M in (x, dt, B, C, z))
    options |= {f"{name}_t": M.stride(1) for name, M in (("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z))}
    tensors = (x, dt, A.contiguous(), B, C, x if D is None else D.contiguous(), z)
    return tensors, strides, options | {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _state_shapes(x: Tensor, A: Tensor, return_state: bool, keep: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    batch, T, D = x.shape
    N = A.shape[2]
    chunks = triton.cdiv(T, configured("selective_scan.forward", config_of, A.shape[2], FORWARD_LANES).chunk)
    return (batch, D, N) if return_state else (batch, 0), (batch, chunks, D, N) if keep else (batch, 0)


def _empty_like(M: Tensor | None, x: Tensor) -> Tensor:
    """Contiguous memory for the gradient of M; without an M, no elements, but x's batch, as vmap needs it."""
    if M is None:
        return x.new_empty(x.shape[0], 0)
    return torch.empty_like(M, memory_format=torch.contiguous_format)
