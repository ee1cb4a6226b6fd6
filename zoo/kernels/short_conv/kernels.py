"""A tile of tokens and channels a program. Its shifted tiles overlap: all but one come out of a core's own cache."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import load_rows, store_rows


@triton.jit
def load_inputs(x, x_t, first, t, d, T, D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, HAS_FIRST: tl.constexpr):
    """Tokens t of one sequence in fp32; before its start they are those of `first` (W-1, D), or zeros."""
    inputs = load_rows(x, t, x_t, (t >= 0) & (t < T), d, D, BLOCK).to(tl.float32)
    if HAS_FIRST:
        inputs += load_rows(first, t + W - 1, D, (t < 0) & (t > -W), d, D, BLOCK).to(tl.float32)
    return inputs


@triton.jit
def load_tap(weight, j, d, D: tl.constexpr, W: tl.constexpr):
    """What x_{t-j} is multiplied by."""
    return tl.load(weight + d * W + (W - 1 - j), mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def convolve(
    x, x_t, first, weight, bias, t, d, T,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    total = load_tap(weight, 0, d, D, W) * load_inputs(x, x_t, first, t, d, T, D, W, BLOCK, HAS_FIRST)
    for j in tl.static_range(1, W):
        total += load_tap(weight, j, d, D, W) * load_inputs(x, x_t, first, t - j, d, T, D, W, BLOCK, HAS_FIRST)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def load_slopes(
    x, x_t, first, weight, bias, dy, dy_t, t, d, T,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """The gradient of the sum at tokens t; zeros outside the sequence."""
    slopes = load_rows(dy, t, dy_t, (t >= 0) & (t < T), d, D, BLOCK).to(tl.float32)
    if SILU:
        total = convolve(x, x_t, first, weight, bias, t, d, T, D, W, BLOCK, HAS_BIAS, HAS_FIRST)
        gate = tl.sigmoid(total)
        slopes *= gate * (1 + total * (1 - gate))
    return slopes


@triton.jit
def forward_kernel(
    x, weight, bias, first, y, T, per_group, x_b, x_t,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """One program per sequence, chunk of C tokens and BLOCK channels; weights (groups, D, W), bias (groups, D)."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    chunks = tl.cdiv(T, C)
    t = tl.program_id(0) // blocks % chunks * C + tl.cast(tl.arange(0, C), tl.int64)
    b = tl.cast(tl.program_id(0) // (blocks * chunks), tl.int64)
    group = b // per_group
    total = convolve(
        x + b * x_b, x_t, first + b * (W - 1) * D, weight + group * D * W, bias + group * D, t, d, T,
        D, W, BLOCK, HAS_BIAS, HAS_FIRST,
    )  # fmt: skip
    if SILU:
        total *= tl.sigmoid(total)
    store_rows(y + b * T * D, total, t, D, t < T, d, D, BLOCK)


@triton.jit
def backward_kernel(
    x, weight, bias, first, dy, dx, dtaps, dfirst, T, per_group, x_b, x_t, dy_b, dy_t,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """As the forward. With an initial state the chunks begin W-1 tokens earlier, and dx there is its gradient.

    dtaps (B, chunks, W + HAS_BIAS, D): the part of each chunk in the gradient of the taps, in their order in memory,
    and of the bias behind them.
    """
    past: tl.constexpr = W - 1 if HAS_FIRST else 0
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    chunks = tl.cdiv(T + past, C)
    chunk = tl.cast(tl.program_id(0) // blocks, tl.int64)
    t = chunk % chunks * C - past + tl.cast(tl.arange(0, C), tl.int64)
    b = chunk // chunks
    group = b // per_group
    x += b * x_b
    dy += b * dy_b
    first += b * (W - 1) * D
    weight += group * D * W
    bias += group * D
    dtaps += chunk * (W + HAS_BIAS) * D + d

    slopes = load_slopes(
        x, x_t, first, weight, bias, dy, dy_t, t, d, T, D, W, BLOCK, SILU, HAS_BIAS, HAS_FIRST
    )  # fmt: skip
    b_dx = load_tap(weight, 0, d, D, W) * slopes
    for j in tl.static_range(1, W):
        b_dx += load_tap(weight, j, d, D, W) * load_slopes(
            x, x_t, first, weight, bias, dy, dy_t, t + j, d, T, D, W, BLOCK, SILU, HAS_BIAS, HAS_FIRST
        )  # fmt: skip
    for j in tl.static_range(W):
        dtap = tl.sum(slopes * load_inputs(x, x_t, first, t - j, d, T, D, W, BLOCK, HAS_FIRST), 0)
        tl.store(dtaps + (W - 1 - j) * D, dtap, mask=d < D)
    if HAS_BIAS:
        tl.store(dtaps + W * D, tl.sum(slopes, 0), mask=d < D)
    store_rows(dx + b * T * D, b_dx, t, D, (t >= 0) & (t < T), d, D, BLOCK)
    if HAS_FIRST:
        store_rows(dfirst + b * (W - 1) * D, b_dx, t + past, D, t < 0, d, D, BLOCK)
