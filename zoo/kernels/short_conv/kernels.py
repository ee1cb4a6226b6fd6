"""A program walks ROWS chunks of C tokens side by side, the last W inputs of each in registers."""

from __future__ import annotations

import triton
import triton.language as tl


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
        taps = taps + (tl.load(weight + d * W + j, mask=d < D, other=0.0).to(tl.float32)[None, :],)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
    return taps


@triton.jit
def convolve(seen, taps, bias, i: tl.constexpr, W: tl.constexpr):
    """The sum at token i of the chunk."""
    total = bias + taps[0] * seen[i].to(tl.float32)
    for j in tl.static_range(1, W):
        total += taps[j] * seen[i + j].to(tl.float32)
    return total


@triton.jit
def forward_kernel(
    x, weight, bias, gate, first, y, T, per_group, x_b, x_t, gate_b, gate_t, weight_g, bias_g,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """One program per group, ROWS chunks and BLOCK channels; weight (groups, D, W), bias (groups, D)."""
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
        seen = seen + (b_x,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
    gates = (seen[0],)
    if HAS_GATE:
        gate += (b * gate_b + start * gate_t)[:, None] + d[None, :]
        gates = (load_at(gate, start, live, d, T, D, BLOCK),)
        for i in tl.static_range(1, C):
            gates = gates + (load_at(gate + i * gate_t, start + i, live, d, T, D, BLOCK),)  # type: ignore[assignment]  # noqa: RUF005
    for i in tl.static_range(C):
        total = convolve(seen, taps, b_bias, i, W)
        if SILU:
            total *= tl.sigmoid(total)
        if HAS_GATE:
            total *= gates[i].to(tl.float32)
        mask = (live & (start + i < T))[:, None] & (d < D)[None, :]
        tl.store(y + i * D, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, weight, bias, gate, first, dy, dx, parts, dgate, dfirst, T, per_group,
    x_b, x_t, gate_b, gate_t, weight_g, bias_g, dy_b, dy_t,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """As the forward. With an initial state the chunks begin W-1 tokens earlier, and dx there is its gradient.

    parts (groups, programs, W + HAS_BIAS, D): each program's part in the gradient of the taps and of the bias.
    """
    past: tl.constexpr = W - 1 if HAS_FIRST else 0
    group, b, chunk, live, d, part = place(per_group, tl.cdiv(T + past, C), D, BLOCK, ROWS)
    start = chunk * C - past
    x += (b * x_b + start * x_t)[:, None] + d[None, :]
    dy += (b * dy_b + start * dy_t)[:, None] + d[None, :]
    dx += (b * T * D + start * D)[:, None] + d[None, :]
    first += (b * (W - 1) * D)[:, None] + d[None, :]
    dfirst += (b * (W - 1) * D)[:, None] + d[None, :]
    taps = load_taps(weight + group * weight_g, d, D, W)
    b_bias = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + group * bias_g + d, mask=d < D, other=0.0).to(tl.float32)[None, :]

    # Inputs from token -W+1 of the chunk on, and what reaches the outputs from its first token on.
    seen = (load_input(x - (W - 1) * x_t, first, start - (W - 1), live, d, T, D, W, BLOCK, HAS_FIRST and W > 1),)
    for i in tl.static_range(1, C + (W - 1) * (1 + SILU)):
        t = i - (W - 1)
        b_x = load_input(x + t * x_t, first, start + t, live, d, T, D, W, BLOCK, HAS_FIRST and t < past)
        seen = seen + (b_x,)  # type: ignore[assignment]  # noqa: RUF005
    given = (load_at(dy, start, live, d, T, D, BLOCK),)
    for i in tl.static_range(1, C + W - 1):
        given = given + (load_at(dy + i * dy_t, start + i, live, d, T, D, BLOCK),)  # type: ignore[assignment]  # noqa: RUF005
    gates = (given[0],)
    if HAS_GATE:
        gate += (b * gate_b + start * gate_t)[:, None] + d[None, :]
        dgate += (b * T * D + start * D)[:, None] + d[None, :]
        gates = (load_at(gate, start, live, d, T, D, BLOCK),)
        for i in tl.static_range(1, C + W - 1):
            gates = gates + (load_at(gate + i * gate_t, start + i, live, d, T, D, BLOCK),)  # type: ignore[assignment]  # noqa: RUF005

    zeros = tl.zeros((ROWS, BLOCK), tl.float32)
    dtaps = (zeros,)
    for _ in tl.static_range(W):
        dtaps = dtaps + (zeros,)  # type: ignore[assignment]  # noqa: RUF005
    slopes = (zeros,)
    for i in tl.static_range(C + W - 1):
        slope = given[i].to(tl.float32)
        if HAS_GATE and i < C:
            ungated = convolve(seen, taps, b_bias, i, W)
            if SILU:
                ungated *= tl.sigmoid(ungated)
            mask = (live & (start + i >= 0) & (start + i < T))[:, None] & (d < D)[None, :]
            tl.store(dgate + i * D, (slope * ungated).to(dgate.dtype.element_ty), mask=mask)
        if HAS_GATE:
            slope *= gates[i].to(tl.float32)
        if SILU:
            total = convolve(seen, taps, b_bias, i, W)
            opened = tl.sigmoid(total)
            slope *= opened * (1 + total * (1 - opened))
        slopes = slopes + (slope,)  # type: ignore[assignment]  # noqa: RUF005
        if i < C:
            sums = (dtaps[0] + slope * seen[i].to(tl.float32),)
            for j in tl.static_range(1, W):
                sums = sums + (dtaps[j] + slope * seen[i + j].to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
            dtaps = sums + (dtaps[W] + slope,)  # type: ignore[assignment]  # noqa: RUF005
        if i >= W - 1:
            b_dx = zeros
            for j in tl.static_range(W):
                b_dx += taps[W - 1 - j] * slopes[i - (W - 1) + 1 + j]
            t = start + (i - (W - 1))
            inside = live[:, None] & (d < D)[None, :]
            tl.store(dx + (i - (W - 1)) * D, b_dx.to(dx.dtype.element_ty), mask=inside & ((t >= 0) & (t < T))[:, None])
            if HAS_FIRST and i < W - 1 + past:
                before = dfirst + (t + past)[:, None] * D
                tl.store(before, b_dx.to(dfirst.dtype.element_ty), mask=inside & (t < 0)[:, None])
    parts += part * (W + HAS_BIAS) * D + d
    for j in tl.static_range(W + HAS_BIAS):
        tl.store(parts + j * D, tl.sum(dtaps[j], 0), mask=d < D)


@triton.jit
def sum_kernel(
    parts, dweight, dbias, number,
    D: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums parts (groups, number, W + HAS_BIAS, D) over `number`; one program a group and COLUMNS of the sums."""
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
