"""A program walks ROWS chunks of C tokens side by side, the last inputs of each in registers."""

# Tuples grow by sums, because Triton has no star, and so change their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import LOG2E


@triton.jit
def place(per_group, chunks, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The group, sequences and chunks of this program's rows, which of them there are, and its channels."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    part = tl.cast(tl.program_id(0) // blocks, tl.int64)
    parts = tl.cdiv(per_group * chunks, ROWS)
    row = part % parts * ROWS + tl.arange(0, ROWS)
    group = part // parts
    return group, group * per_group + row // chunks, row % chunks, row < per_group * chunks, d, part


@triton.jit
def load_at(x, t, live, d, T, D: tl.constexpr, BLOCK: tl.constexpr):
    """What x (ROWS, BLOCK) points to where token t of its row is in the sequence."""
    mask = (live & (t >= 0) & (t < T))[:, None]
    if D % BLOCK != 0:
        mask = mask & (d < D)[None, :]
    return tl.load(x, mask=mask, other=0.0)


@triton.jit
def load_input(
    x, first, t, live, d, T, D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, FROM_FIRST: tl.constexpr
):
    """As load_at; before the sequence, what `first` holds: it points to (W-1, D) for each row."""
    b_x = load_at(x, t, live, d, T, D, BLOCK)
    if FROM_FIRST:
        mask = (live & (t < 0) & (t > -W))[:, None] & (d < D)[None, :]
        b_x += tl.load(first + (t + W - 1)[:, None] * D, mask=mask, other=0.0)
    return b_x


@triton.jit
def load_taps(weight, d, D: tl.constexpr, W: tl.constexpr):
    """What x_{t-W+1}, ..., x_t are multiplied by."""
    taps = (tl.load(weight + d * W, mask=d < D, other=0.0).to(tl.float32)[None, :],)
    for j in tl.static_range(1, W):
        taps = taps + (tl.load(weight + d * W + j, mask=d < D, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def convolve(seen, taps, bias, i: tl.constexpr, W: tl.constexpr):
    """The sum at token i of the chunk."""
    total = bias + taps[0] * seen[i].to(tl.float32)
    for j in tl.static_range(1, W):
        total += taps[j] * seen[i + j].to(tl.float32)
    return total


@triton.jit
def sigmoid(x):
    # A division costs more, for the sake of numbers that do not occur here.
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2E))
    return root * root


@kernel
def forward_kernel(
    x, weight, bias, gate, first, y, T, per_group, x_b, x_t, gate_b, gate_t, weight_g, bias_g,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """One program per group, ROWS chunks and BLOCK channels; weight (groups, D, W), bias (groups, D)."""
    wait_for_earlier()
    group, b, chunk, live, d, _ = place(per_group, tl.cdiv(T, C), D, BLOCK, ROWS)
    start = chunk * C
    x += (b * x_b + start * x_t)[:, None] + d[None, :]
    y += (b * T * D + start * D)[:, None] + d[None, :]
    first += (b * (W - 1) * D)[:, None] + d[None, :]
    taps = load_taps(weight + group * weight_g, d, D, W)
    b_bias = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + group * bias_g + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    # All loads before the first store, which would hold them up.
    seen = (load_input(x - (W - 1) * x_t, first, start - (W - 1), live, d, T, D, W, BLOCK, HAS_FIRST and W > 1),)
    for i in tl.static_range(1, C + W - 1):
        t = i - (W - 1)
        b_x = load_input(x + t * x_t, first, start + t, live, d, T, D, W, BLOCK, HAS_FIRST and t < 0)
        seen = seen + (b_x,)
    gates = (seen[0],)
    if HAS_GATE:
        gate += (b * gate_b + start * gate_t)[:, None] + d[None, :]
        gates = (load_at(gate, start, live, d, T, D, BLOCK),)
        for i in tl.static_range(1, C):
            gates = gates + (load_at(gate + i * gate_t, start + i, live, d, T, D, BLOCK),)
    for i in tl.static_range(C):
        total = convolve(seen, taps, b_bias, i, W)
        if SILU:
            total *= sigmoid(total)
        if HAS_GATE:
            total *= gates[i].to(tl.float32)
        mask = (live & (start + i < T))[:, None] & (d < D)[None, :]
        tl.store(y + i * D, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def slope_at(dy, gate, window, taps, bias, W: tl.constexpr, SILU: tl.constexpr, HAS_GATE: tl.constexpr):
    """Of the token that ends `window`: the gradients of its sum and of its gate."""
    slope, dgate = dy.to(tl.float32), dy.to(tl.float32)
    if HAS_GATE:
        slope *= gate.to(tl.float32)
    if SILU or HAS_GATE:
        total = convolve(window, taps, bias, 0, W)
        if SILU:
            opened = sigmoid(total)
            dgate *= opened
            slope *= opened * (1 + total * (1 - opened))
        dgate *= total
    return slope, dgate


@triton.jit
def gradients_at(oldest, slopes, taps, dtaps, W: tl.constexpr):
    """Of a token with the slopes of the W tokens from it on: its own, and the sums of those of taps and bias."""
    dx = taps[W - 1] * slopes[0]
    sums = (dtaps[0] + slopes[0] * oldest,)
    for j in tl.static_range(1, W):
        dx += taps[W - 1 - j] * slopes[j]
        sums = sums + (dtaps[j] + slopes[j] * oldest,)
    return dx, sums + (dtaps[W] + slopes[0],)


@kernel
def backward_kernel(
    x, weight, bias, gate, first, dy, dx, parts, dgate, dfirst, T, per_group,
    x_b, x_t, gate_b, gate_t, weight_g, bias_g, dy_b, dy_t,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """As the forward. With an initial state the chunks begin W-1 tokens earlier, and dx there is its gradient.

    parts (groups, programs, W + HAS_BIAS, D): each program's part in the gradient of the taps and of the bias.
    """
    wait_for_earlier()
    past: tl.constexpr = W - 1 if HAS_FIRST else 0
    group, b, chunk, live, d, part = place(per_group, tl.cdiv(T + past, C), D, BLOCK, ROWS)
    start = chunk * C - past
    x += (b * x_b + start * x_t)[:, None] + d[None, :]
    dy += (b * dy_b + start * dy_t)[:, None] + d[None, :]
    dx += (b * T * D + start * D)[:, None] + d[None, :]
    first += (b * (W - 1) * D)[:, None] + d[None, :]
    dfirst += (b * (W - 1) * D)[:, None] + d[None, :]
    if HAS_GATE:
        gate += (b * gate_b + start * gate_t)[:, None] + d[None, :]
        dgate += (b * T * D + start * D)[:, None] + d[None, :]
    taps = load_taps(weight + group * weight_g, d, D, W)
    b_bias = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + group * bias_g + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    inside = live[:, None] & (d < D)[None, :]

    # A token's dx needs the slopes of the W-1 tokens that follow: the walk is so far ahead of what it stores.
    seen = ()
    for i in tl.static_range(W - 1):
        t = i - (W - 1)
        seen = seen + (load_input(x + t * x_t, first, start + t, live, d, T, D, W, BLOCK, HAS_FIRST),)
    slopes = ()
    for i in tl.static_range(W - 1):
        b_x = load_input(x + i * x_t, first, start + i, live, d, T, D, W, BLOCK, HAS_FIRST)
        b_dy = load_at(dy + i * dy_t, start + i, live, d, T, D, BLOCK)
        b_gate = load_at(gate + i * gate_t, start + i, live, d, T, D, BLOCK) if HAS_GATE else b_dy
        slope, b_dgate = slope_at(b_dy, b_gate, seen + (b_x,), taps, b_bias, W, SILU, HAS_GATE)
        if HAS_GATE:
            mask = inside & ((chunk == 0) & (start + i >= 0) & (start + i < T))[:, None]
            tl.store(dgate + i * D, b_dgate.to(dgate.dtype.element_ty), mask=mask)
        seen = seen[1:] + (b_x,)
        slopes = slopes + (slope,)
    dtaps = ()
    for _ in tl.static_range(W + 1):
        dtaps = dtaps + (tl.zeros((ROWS, BLOCK), tl.float32),)
    for at in range(0, C, STEPS):
        given = ()
        for i in tl.static_range(STEPS):
            t = at + (i + W - 1)
            b_dy = load_at(dy + t * dy_t, start + t, live, d, T, D, BLOCK)
            b_gate = load_at(gate + t * gate_t, start + t, live, d, T, D, BLOCK) if HAS_GATE else b_dy
            given = given + ((load_at(x + t * x_t, start + t, live, d, T, D, BLOCK), b_dy, b_gate),)
        for i in tl.static_range(STEPS):
            b_x, b_dy, b_gate = given[i]
            seen = seen + (b_x,)
            slope, b_dgate = slope_at(b_dy, b_gate, seen, taps, b_bias, W, SILU, HAS_GATE)
            slopes = slopes + (slope,)
            s = start + (at + i)
            if HAS_GATE:
                ahead = dgate + (at + (i + W - 1)) * D
                tl.store(ahead, b_dgate.to(dgate.dtype.element_ty), mask=inside & (s + (W - 1) < T)[:, None])
            b_dx, dtaps = gradients_at(seen[0].to(tl.float32), slopes, taps, dtaps, W)
            tl.store(dx + (at + i) * D, b_dx.to(dx.dtype.element_ty), mask=inside & ((s >= 0) & (s < T))[:, None])
            if HAS_FIRST:
                to = dfirst + (s + past)[:, None] * D
                tl.store(to, b_dx.to(dfirst.dtype.element_ty), mask=inside & (s < 0)[:, None])
            seen = seen[1:]
            slopes = slopes[1:]
    parts += part * (W + HAS_BIAS) * D + d
    for j in tl.static_range(W):
        tl.store(parts + (W - 1 - j) * D, tl.sum(dtaps[j], 0), mask=d < D)
    if HAS_BIAS:
        tl.store(parts + W * D, tl.sum(dtaps[W], 0), mask=d < D)


@kernel
def sum_kernel(
    parts, dweight, dbias, number,
    D: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums parts (groups, number, W + HAS_BIAS, D) over `number`; one program a group and COLUMNS of the sums."""
    wait_for_earlier()
    width: tl.constexpr = (W + HAS_BIAS) * D
    blocks: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.cast(tl.program_id(0) // blocks, tl.int64)
    parts += group * number * width + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, number, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        total += tl.load(
            parts + tl.cast(row, tl.int64) * width, mask=(row < number) & (column < width)[None, :], other=0.0
        )
    sums = tl.sum(total, 0)
    j, d = column // D, column % D
    tl.store(dweight + group * D * W + d * W + j, sums.to(dweight.dtype.element_ty), mask=j < W)
    if HAS_BIAS:
        tl.store(dbias + group * D + d, sums.to(dbias.dtype.element_ty), mask=j == W)
