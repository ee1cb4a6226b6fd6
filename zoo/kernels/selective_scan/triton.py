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
from zoo.kernels.launch import Config, check_launch, configured, empty_like, fold_batch, rows
from zoo.kernels.selective_scan.backward_kernels import backward_kernel, sum_kernel
from zoo.kernels.selective_scan.forward_kernels import forward_kernel

# Steps of a chunk, which the kernels' matrix products are made for.
CHUNK = 4
LARGEST_STATE = 256
# Numbers that a program has on their way at a time as it sums parts.
LOADED = 2048


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    check_launch("selective_scan", x, dt, A, B, C, D, z, dt_bias)
    if A.shape[1] > LARGEST_STATE:
        raise UnsupportedError(
            f"selective_scan: N = {A.shape[1]}; the Triton backend has up to {LARGEST_STATE} states a channel. "
            "Pass impl='chunked'."
        )
    by_step = [tensor.shape[:2] == x.shape[:2] and tensor.dim() == 3 for tensor in (dt, B, C)]
    dt, B, C = (M if steps else M[None] for M, steps in zip((dt, B, C), by_step, strict=True))
    D, dt_bias = (None if M is None else M[None] for M in (D, dt_bias))
    if initial_state is not None:
        initial_state = initial_state.float()
    y, last, *_ = torch.ops.zoo.selective_scan(
        x, dt, A[None], B, C, D, z, dt_bias, initial_state, by_step, return_state, torch.is_grad_enabled()
    )
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
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    by_step: list[bool],
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the final state and, to `keep` for the backward, states between chunks, (B, chunks, D, N), and the ungated y.

    A, D, dt_bias and, of dt, B and C, those that are not `by_step` have groups as their first axis.
    """
    batch, T, channels = x.shape
    config = configured("selective_scan.forward", forward_config, A.shape[2], batch, channels)
    tensors, strides, options = _prepared(x, dt, A, B, C, D, z, dt_bias, by_step, config)
    blocks = triton.cdiv(channels, config.block)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last, kept = (torch.empty(shape, dtype=t, device=x.device) for shape, t in _states(x, A, return_state, keep))
    ungated = empty_like(y if keep and z is not None else None, x)
    first = x if initial_state is None else initial_state.contiguous()
    forward_kernel[(batch * blocks,)](
        *tensors, first, y, ungated, last, kept, T, batch // len(A), *strides, **options,
        HAS_FIRST=initial_state is not None, HAS_LAST=return_state, KEEP=keep,
    )  # fmt: skip
    return y, last, kept, ungated


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    by_step: list[bool],
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last, kept = (x.new_empty(shape, dtype=dtype) for shape, dtype in _states(x, A, return_state, keep))
    return x.new_empty(x.shape), last, kept, empty_like(x if keep and z is not None else None, x)


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    kept: Tensor,
    ungated: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    by_step: list[bool],
    has_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, dt, A, B, C, D, z, dt_bias and the initial state; those without an input have no elements."""
    batch, T, channels = x.shape
    groups, _, N = A.shape
    config = configured("selective_scan.backward", backward_config, N)
    tensors, strides, options = _prepared(x, dt, A, B, C, D, z, dt_bias, by_step, config)
    blocks = triton.cdiv(channels, config.block)
    dy = rows(dy)
    dx, dz = empty_like(x, x), empty_like(z, x)

    def parts(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    # The number of parts is the second axis.
    sums = {"A": (parts(groups, batch // groups, channels, N), A)}
    for name, M in (("D", D), ("dt_bias", dt_bias), ("dt", None if by_step[0] else dt)):
        if M is not None:
            sums[name] = parts(groups, batch // groups, channels), M
    for name, M, steps in (("B", B, by_step[1]), ("C", C, by_step[2])):
        sums[name] = parts(1, blocks, batch, T, N) if steps else parts(groups, batch // groups, channels, N), M
    ddt = empty_like(dt, x) if by_step[0] else sums["dt"][0]
    dD, dbias = (sums[name][0] if name in sums else x for name in ("D", "dt_bias"))
    dfirst = parts(batch, channels, N) if has_first else parts(batch, 0)
    backward_kernel[(batch * blocks,)](
        *tensors, ungated, kept, dy, x if dlast is None else dlast.contiguous(), dx, ddt, sums["A"][0], sums["B"][0],
        sums["C"][0], dD, dz, dbias, dfirst, T, batch // groups, batch * T * N, *strides, dy.stride(0),
        dy_t=dy.stride(1), **options, HAS_FIRST=has_first, HAS_LAST=dlast is not None,
        PRECISION="tf32" if x.dtype == torch.bfloat16 else "tf32x3",
    )  # fmt: skip
    done = _sum_parts(sums)
    dB, dC = (done[name][0] if steps else done[name] for name, steps in (("B", by_step[1]), ("C", by_step[2])))
    dD, dbias = (done[name] if name in done else empty_like(None, x) for name in ("D", "dt_bias"))
    return dx, ddt if by_step[0] else done["dt"], done["A"], dB, dC, dD, dz, dbias, dfirst


@_backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    kept: Tensor,
    ungated: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    by_step: list[bool],
    has_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], x.shape[2], A.shape[2]) if has_first else (x.shape[0], 0)
    gradients = [empty_like(M, x) for M in (x, dt, A, B, C, D, z, dt_bias)]
    return (*gradients, x.new_empty(shape, dtype=torch.float32))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], *output[2:])
    ctx.has_first = inputs[8] is not None
    ctx.by_step, ctx.return_state = inputs[9], inputs[10]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    gradients = torch.ops.zoo.selective_scan_backward(
        *tensors, dy, dlast if ctx.return_state else None, ctx.by_step, ctx.has_first
    )
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def forward_config(N: int, batch: int, channels: int) -> Config:
    """As for the walk back; of many programs, pairs of warps that share B and C: they take fewer registers each."""
    many = 8 < N <= 16 and channels > 32 and batch * channels >= 1 << 17
    return Config(CHUNK, block=64, num_warps=2, num_stages=1) if many else backward_config(N)


def backward_config(N: int) -> Config:
    """block: channels of a program. A thread has up to 16 states of one."""
    num_warps = max(1, triton.next_power_of_2(N) // 16)
    return Config(CHUNK, block=32, num_warps=num_warps, num_stages=1)


def _prepared(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    by_step: list[bool],
    config: Config,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """The inputs of both kernels, their strides over batch and time, and options."""
    x = rows(x)
    z = x if z is None else rows(z)
    dt = rows(dt) if by_step[0] else dt.contiguous()
    wide = torch.promote_types(B.dtype, C.dtype)
    B, C = (rows(M.to(wide)) if steps else M.contiguous() for M, steps in zip((B, C), by_step[1:], strict=True))
    n, threads = triton.next_power_of_2(A.shape[2]), 32 * config.num_warps // config.block
    options = {"D": x.shape[2], "N": A.shape[2], "NT": threads}
    options |= {"NI": min(4, n // threads), "NK": max(1, n // (4 * threads)), "LANES": config.block, "S": CHUNK}
    options["WHOLE"] = x.shape[1] % CHUNK == 0
    options |= {"DT_BY_STEP": by_step[0], "B_BY_STEP": by_step[1], "C_BY_STEP": by_step[2]}
    options |= {"HAS_SKIP": D is not None, "HAS_GATE": z is not x, "HAS_BIAS": dt_bias is not None}
    strides = tuple(M.stride(0) for M in (x, dt, B, C, z))
    options |= {f"{name}_t": M.stride(1) for name, M in (("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z))}
    D, dt_bias = (x if M is None else M.contiguous() for M in (D, dt_bias))
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return (x, dt, A.contiguous(), B, C, D, z, dt_bias), strides, options


def _states(
    x: Tensor, A: Tensor, return_state: bool, keep: bool
) -> tuple[tuple[tuple[int, ...], torch.dtype], tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the final state and of those that are kept: the latter take more bytes than all the rest."""
    batch, T, D = x.shape
    N = A.shape[2]
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    last, kept = (batch, D, N), (batch, triton.cdiv(T, CHUNK), D, N)
    return (last if return_state else (batch, 0), torch.float32), (kept if keep else (batch, 0), dtype)


def _sum_parts(sums: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of each (groups, number, ...) in fp32 the sum over `number` in the dtype of the tensor beside it: one launch."""
    parts = [part for part, _ in sums.values()]
    done = [part.new_empty(part[:, 0].shape, dtype=M.dtype) for part, M in sums.values()]
    numbers, sizes = [part.shape[1] for part in parts], [part[0, 0].numel() for part in parts]
    loaded_rows = [min(triton.next_power_of_2(number), 64) for number in numbers]
    ends, end = [], 0
    for part, size, count in zip(parts, sizes, loaded_rows, strict=True):
        end += part.shape[0] * triton.cdiv(size, LOADED // count)
        ends.append(end)
    sum_kernel[(end,)](
        tuple(parts), tuple(done), tuple(numbers), tuple(sizes), tuple(ends), ROWS=tuple(loaded_rows), LOADED=LOADED
    )
    return dict(zip(sums, done, strict=True))
