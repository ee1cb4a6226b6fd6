"""Products with a Toeplitz matrix that exists a tile at a time; for long or few sequences the Fourier transform.

Every tensor of the custom ops has the batch, or the groups that divide the batch evenly and have kernels of their own,
as its first axis. u, y and the gate are (B, T, D); what the ops keep between them has time last.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, precision, rows
from zoo.kernels.long_conv import kernels

LONGEST = 4096
# Sequences that the direct form takes the time of at least, however few there are.
FEWEST_SEQUENCES = 32
PROGRAMS = 256
TAPS = 256
# Blocks of a sequence that a program can hold.
HELD = 4


def long_conv(
    u: Tensor, kernel: Tensor, skip: Tensor | None, gate: Tensor | None, past: Tensor | None, time_last: bool
) -> Tensor:
    check_launch("long_conv", u, kernel, skip, gate, past)
    seen = u if past is None else torch.cat([past.to(u.dtype), u], dim=1)
    kernel = kernel[:, : seen.shape[1]]
    skip = None if skip is None else skip[None]
    return torch.ops.zoo.long_conv(seen, kernel[None], skip, gate, u.shape[1], time_last)[0]


@torch.library.custom_op("zoo::long_conv", mutates_args=())
def _forward(
    u: Tensor, kernel: Tensor, skip: Tensor | None, gate: Tensor | None, T: int, time_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The last T outputs; with time last, u and, for a gate's gradient, these outputs before the gate."""
    B, seen, D = u.shape
    turned = u.new_empty(B, D, seen, dtype=time_dtype(u, B // len(kernel), seen))
    turn(rows(u), turned, seen, to_time=True)
    ungated = convolved(turned, kernel, skip, T)
    if time_last:
        return ungated.to(u.dtype), turned, u.new_empty(B, 0, 0)
    y = u.new_empty(B, T, D)
    turn(ungated, y, T, gate=gate)
    return y, turned, u.new_empty(B, 0, 0) if gate is None else ungated.to(u.dtype)


@_forward.register_fake
def _(
    u: Tensor, kernel: Tensor, skip: Tensor | None, gate: Tensor | None, T: int, time_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, seen, D = u.shape
    turned = u.new_empty(B, D, seen, dtype=time_dtype(u, B // len(kernel), seen))
    y = u.new_empty(B, D, T) if time_last else u.new_empty(B, T, D)
    return y, turned, u.new_empty(B, 0, 0) if gate is None else u.new_empty(B, D, T)


@torch.library.custom_op("zoo::long_conv_backward", mutates_args=())
def _backward(
    turned: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    gate: Tensor | None,
    ungated: Tensor,
    dy: Tensor,
    time_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """du, dkernel in fp32, whose first tap is dskip as well, and dgate, without elements if there is no gate."""
    B, D, seen = turned.shape
    dgate = dy.new_empty(B, 0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    if time_last:
        dturned = dy.to(turned.dtype).contiguous()
    else:
        dturned = turned.new_empty(B, D, dy.shape[1])
        turn(rows(dy) if gate is None else ungated, dturned, dy.shape[1], gate=gate, dy=dy, dgate=dgate, to_time=True)
    du = dy.new_empty(B, seen, D)
    du_turned, dkernel = convolved_backward(dturned, turned, kernel, skip)
    turn(du_turned, du, seen)
    return du, dkernel, dgate


@_backward.register_fake
def _(
    turned: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    gate: Tensor | None,
    ungated: Tensor,
    dy: Tensor,
    time_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, D, seen = turned.shape
    dgate = dy.new_empty(B, 0) if gate is None else gate.new_empty(gate.shape)
    return dy.new_empty(B, seen, D), kernel.new_empty(kernel.shape, dtype=torch.float32), dgate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, kernel, skip, gate, _, ctx.time_last = inputs
    ctx.save_for_backward(output[1], kernel, skip, gate, output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None, None
    turned, kernel, skip, gate, ungated = ctx.saved_tensors
    du, dkernel, dgate = torch.ops.zoo.long_conv_backward(turned, kernel, skip, gate, ungated, dy, ctx.time_last)
    dskip = None if skip is None else dkernel[..., 0].to(skip.dtype)
    return du, dkernel.to(kernel.dtype), dskip, None if gate is None else dgate, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def _direct(batch: int, seen: int) -> bool:
    """Whether a product with a Toeplitz matrix is faster: for short sequences, or longer ones if there are many."""
    return seen <= LONGEST and seen <= 16 * max(batch, FEWEST_SEQUENCES)


def time_dtype(u: Tensor, batch: int, seen: int) -> torch.dtype:
    """Of u with time last, when a kernel has `batch` sequences of `seen` tokens."""
    return u.dtype if _direct(batch, seen) else torch.float32


def convolved(x: Tensor, kernel: Tensor, skip: Tensor | None, T: int) -> Tensor:
    """x (B, D, seen), kernel (groups, D, L), skip (groups, D) -> the last T outputs (B, D, T)."""
    B, D, seen = x.shape
    if _direct(B // len(kernel), seen):
        y = x.new_empty(B, D, T)
        _convolve(x, kernel, skip, y, seen - T, reverse=False)
        return y
    n = triton.next_power_of_2(seen + kernel.shape[2] - 1)
    product = _grouped(torch.fft.rfft(x, n=n), kernel) * _spectrum(kernel, skip, n)
    return torch.fft.irfft(product, n=n)[..., seen - T : seen].flatten(0, 1).contiguous()


def convolved_backward(dy: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx, and dkernel in fp32, whose first tap is dskip as well, from dy (B, D, T)."""
    B, D, seen = x.shape
    groups, _, L = kernel.shape
    T = dy.shape[2]
    if not _direct(B // groups, seen):
        n = triton.next_power_of_2(seen + L - 1)
        spectrum = _grouped(torch.fft.rfft(F.pad(dy, (seen - T, 0)), n=n), kernel)
        dx = torch.fft.irfft(spectrum * _spectrum(kernel, skip, n).conj(), n=n)[..., :seen].flatten(0, 1)
        product = spectrum * _grouped(torch.fft.rfft(x, n=n), kernel).conj()
        return dx.contiguous(), torch.fft.irfft(product.sum(1), n=n)[..., :L].contiguous()
    dx = torch.empty_like(x)
    _convolve(dy, kernel, skip, dx, seen - T, reverse=True)
    config = configured("long_conv.pairs_backward", pairs_config, x)
    C = config.chunk
    times = triton.cdiv(T, C)
    short = seen == T and times <= HELD
    # Several blocks of a sequence leave room for fewer sequences.
    ROWS = min(32, config.block) if short and times > 1 else config.block
    # No output is further from an input, and no tap reaches further.
    distances = 1 + min(triton.cdiv(L - 1, C), (T - 1) // C + triton.cdiv(seen - T, C))
    blocks = triton.cdiv(B // groups, ROWS)
    steps = triton.cdiv(blocks, min(blocks, max(1, PROGRAMS // (groups * D * (1 if short else distances)))))
    parts = triton.cdiv(blocks, steps)
    pairs = torch.empty(groups, D, distances, parts, C, C, dtype=torch.float32, device=dy.device)
    options = {"D": D, "ROWS": ROWS, "C": C, "PRECISION": precision(x)}
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if short:
        kernels.pairs_short_kernel[(groups * D * parts,)](
            dy, x, pairs, T, B // groups, parts, steps, TIMES=times, DISTANCES=distances, **options
        )
    else:
        kernels.pairs_kernel[(groups * D * distances * parts,)](
            dy, x, pairs, T, seen, seen - T, B // groups, distances, parts, steps, **options
        )
    dkernel = torch.empty(groups, D, L, dtype=torch.float32, device=dy.device)
    kernels.diagonals_kernel[(groups * D * triton.cdiv(L, C),)](pairs, dkernel, L, distances, parts, C=C)
    return dx, dkernel


def _grouped(x: Tensor, kernel: Tensor) -> Tensor:
    """(B, ...) -> (groups, B / groups, ...)."""
    return x.unflatten(0, (len(kernel), -1))


def _spectrum(kernel: Tensor, skip: Tensor | None, n: int) -> Tensor:
    """Of kernel (groups, D, L) with the skip in its first tap: (groups, 1, D, n / 2 + 1)."""
    kernel = kernel.float()
    if skip is not None:
        kernel = torch.cat([kernel[..., :1] + skip.float()[..., None], kernel[..., 1:]], dim=-1)
    return torch.fft.rfft(kernel, n=n)[:, None]


def convolve_config(x: Tensor) -> Config:
    """chunk: times of a block; block: sequences, the rows of the product."""
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=1)
    return Config(chunk=64, block=128, num_warps=8, num_stages=3)


def pairs_config(x: Tensor) -> Config:
    if x.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=1)
    return Config(chunk=64, block=64, num_warps=4, num_stages=3)


def short_config(x: Tensor, times: int) -> Config:
    """As convolve_config, of programs that hold `times` blocks of each sequence."""
    config = convolve_config(x)._replace(num_stages=1)
    return config if times <= 2 or x.dtype == torch.float32 else config._replace(block=64, num_warps=4)


def turn_config(x: Tensor) -> Config:
    return Config(chunk=64, block=64, num_warps=4, num_stages=1)


def turn(
    x: Tensor,
    out: Tensor,
    T: int,
    *,
    gate: Tensor | None = None,
    dy: Tensor | None = None,
    dgate: Tensor | None = None,
    to_time: bool = False,
) -> None:
    """Between (B, T, D) and (B, D, T), as `kernels.turn_kernel` has it."""
    turned, D = (out if to_time or dgate is not None else x), (out.shape[1] if to_time else out.shape[2])
    gated = gate is not None
    gate, dy = (x if M is None else rows(M) for M in (gate, dy))
    config = configured("long_conv.turn", turn_config, x)
    kernels.turn_kernel[(len(x) * triton.cdiv(T, config.chunk) * triton.cdiv(D, config.block),)](
        x, gate, dy, out, out if dgate is None else dgate, T, turned.stride(1),
        *x.stride()[:2], *gate.stride()[:2], *dy.stride()[:2],
        D=D, C=config.chunk, BLOCK=config.block, TO_TIME=to_time, GATED=gated,
        GATE_GRADIENT=gated and dgate is not None, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _convolve(x: Tensor, kernel: Tensor, skip: Tensor | None, out: Tensor, past: int, *, reverse: bool) -> None:
    B, D, Y = out.shape
    kernel = rows(kernel)
    groups, _, L = kernel.shape
    batch = B // groups
    config = configured("long_conv.backward" if reverse else "long_conv.forward", convolve_config, x)
    C = config.chunk
    # What no tile goes beyond: a tile begins less than C before the first tap, and less than C behind the last.
    offset = C * triton.cdiv(L + 2 * C if reverse else 2 * C, C)
    length = offset + (2 * C if reverse else C * triton.cdiv(L + 2 * C, C))
    taps = x.new_empty(groups, D, kernels.COPIES.value, length)
    kernels.taps_kernel[(groups * D * triton.cdiv(length, TAPS),)](
        kernel, kernel if skip is None else skip.contiguous(), taps, L, length, offset, *kernel.stride()[:2],
        D=D, BLOCK=TAPS, REVERSE=reverse, HAS_SKIP=skip is not None,
    )  # fmt: skip
    times, distances = triton.cdiv(Y, C), 1 + triton.cdiv(L - 1, C)
    if x.shape[2] == Y and times <= HELD:
        config = configured("long_conv.short", short_config, x, times)
        kernels.convolve_short_kernel[(groups * D * triton.cdiv(batch, config.block),)](
            x, taps, out, Y, length, offset, batch, D=D, ROWS=config.block, C=C, TIMES=times,
            DISTANCES=min(times, distances), REVERSE=reverse, PRECISION=precision(x),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return
    kernels.convolve_kernel[(groups * D * triton.cdiv(batch, config.block) * times,)](
        x, taps, out, x.shape[2], Y, L, length, offset, past, batch,
        D=D, ROWS=config.block, C=C, REVERSE=reverse, PRECISION=precision(x),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
