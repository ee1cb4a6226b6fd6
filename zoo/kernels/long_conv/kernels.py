"""A causal convolution as a product with a Toeplitz matrix, a channel at a time.

The products need time as their contiguous axis, the model has channels there: `turn_kernel` goes from one to the other
and does the gating on the way. With p the absolute time of an output and q of an input,

    y_p = sum_q kernel[p - q] u_q       du_q = sum_p kernel[p - q] dy_p       dkernel[l] = sum_p dy_p u_{p-l}

The rows of the products are sequences. Tiles of a Toeplitz matrix come from shifted copies of the kernel, so that
whole vectors can be loaded, and with zeros around them nothing need be masked. For dkernel the sum of the rows is
taken: the C x C matrices dy_p u_q of all blocks of p and q at one distance add up to one, which `diagonals_kernel` sums
along its diagonals.
"""

# Tuples grow by sums, because Triton has no star, and so change their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier

# Elements that one instruction loads.
COPIES = tl.constexpr(8)


@kernel
def turn_kernel(
    x, gate, dy, out, dgate, T, turned_d, x_b, x_t, gate_b, gate_t, dy_b, dy_t,
    D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    TO_TIME: tl.constexpr, GATED: tl.constexpr, GATE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """x (B, T, D) to out (B, D, T) if TO_TIME, else x (B, D, T) to out (B, T, D); times gate (B, T, D) if GATED.

    With GATE_GRADIENT, dgate (B, T, D) = dy x and out = dy gate instead: x has time last, and out as well.
    """
    wait_for_earlier()
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    chunks = tl.cdiv(T, C)
    t = tl.program_id(0) // blocks % chunks * C + tl.cast(tl.arange(0, C), tl.int64)
    b = tl.cast(tl.program_id(0) // (blocks * chunks), tl.int64)
    inside = (t < T)[:, None] & (d < D)[None, :]
    turned = (b * D + d[:, None]) * turned_d + t[None, :]
    turned_inside = (d < D)[:, None] & (t < T)[None, :]
    straight = b * T * D + t[:, None] * D + d[None, :]
    if GATE_GRADIENT or not TO_TIME:
        values = tl.trans(tl.load(x + turned, mask=turned_inside, other=0.0).to(tl.float32))
    else:
        values = tl.load(x + b * x_b + t[:, None] * x_t + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATE_GRADIENT:
        b_dy = tl.load(dy + b * dy_b + t[:, None] * dy_t + d[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dgate + straight, (values * b_dy).to(dgate.dtype.element_ty), mask=inside)
        values = b_dy
    if GATED:
        values *= tl.load(gate + b * gate_b + t[:, None] * gate_t + d[None, :], mask=inside, other=0.0).to(tl.float32)
    values = values.to(out.dtype.element_ty)
    if TO_TIME:
        tl.store(out + turned, tl.trans(values), mask=turned_inside)
    else:
        tl.store(out + straight, values, mask=inside)


@kernel
def taps_kernel(
    kernel, skip, taps, L, length, offset, kernel_g, kernel_d,
    D: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """taps (groups, D, COPIES, length): kernel[y - offset - copy] at y, REVERSE: kernel[offset + copy - y]; else zeros.

    One program a channel and BLOCK taps of all copies. The skip is a part of the first tap.
    """
    wait_for_earlier()
    blocks = tl.cdiv(length, BLOCK)
    y = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    channel = tl.cast(tl.program_id(0) // blocks, tl.int64)
    copy = tl.arange(0, COPIES)[:, None]
    lag = offset + copy - y if REVERSE else y - offset - copy
    source = kernel + channel // D * kernel_g + channel % D * kernel_d + lag
    values = tl.load(source, mask=(lag >= 0) & (lag < L), other=0.0)
    if HAS_SKIP:
        values = values.to(tl.float32) + tl.where(lag == 0, tl.load(skip + channel).to(tl.float32), 0.0)
    taps += (channel * COPIES + copy) * length + y
    tl.store(taps, values.to(taps.dtype.element_ty), mask=y < length)


@kernel
def convolve_kernel(
    x, taps, out, X, Y, L, length, offset, past, batch,
    D: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (groups, batch, D, Y) from x (groups, batch, D, X); one program a channel, ROWS sequences, C times of out.

    Output p is at absolute time past + p. REVERSE: x is the gradient of the outputs and out that of the inputs. A row
    of a Toeplitz tile is taken from the copy of the taps in which it begins at a multiple of COPIES.
    """
    wait_for_earlier()
    times = tl.cdiv(Y, C)
    row_blocks = tl.cdiv(batch, ROWS)
    start = tl.program_id(0) % times * C
    # Neighbours share a channel's kernel.
    rest = tl.program_id(0) // times
    row = rest % row_blocks * ROWS + tl.arange(0, ROWS)
    rest = tl.cast(rest // row_blocks, tl.int64)
    d, group = rest % D, rest // D
    i = tl.arange(0, C)
    taps += rest * COPIES * length
    taps += (i % COPIES * length - i // COPIES * COPIES)[:, None] + i[None, :]
    x += ((group * batch + row) * D + d)[:, None] * X + i[None, :]
    if REVERSE:
        at_start = start - past
        first = tl.maximum(at_start, 0)
        last = tl.minimum(at_start + C + L - 1, X)
    else:
        at_start = start + past
        first = tl.maximum(at_start - L + 1, 0)
        last = tl.minimum(at_start + C, X)
    total = tl.zeros((ROWS, C), tl.float32)
    for at in range(first // C * C, last, C):
        b_x = tl.load(x + at, mask=(row < batch)[:, None] & (at + i < X)[None, :], other=0.0)
        toeplitz = tl.load(taps + (at_start - at + offset))
        total = tl.dot(b_x, toeplitz, total, input_precision=PRECISION)
    out += ((group * batch + row) * D + d)[:, None] * Y + (start + i)[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=(row < batch)[:, None] & (start + i < Y)[None, :])


@kernel
def convolve_short_kernel(
    x, taps, out, T, length, offset, batch,
    D: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, TIMES: tl.constexpr, DISTANCES: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As convolve_kernel of all TIMES blocks of a short sequence, each of which is loaded once."""
    wait_for_earlier()
    SIGN: tl.constexpr = -1 if REVERSE else 1
    row_blocks = tl.cdiv(batch, ROWS)
    # Neighbours read what lies side by side.
    d, rest = tl.program_id(0) % D, tl.program_id(0) // D
    group = tl.cast(rest // row_blocks, tl.int64)
    row = rest % row_blocks * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, C)
    taps += (group * D + d) * COPIES * length + offset
    taps += (i % COPIES * length - i // COPIES * COPIES)[:, None] + i[None, :]
    at = ((group * batch + row) * D + d)[:, None] * T + i[None, :]
    inside = (row < batch)[:, None]
    tiles = (tl.load(taps),)
    for distance in tl.static_range(1, DISTANCES):
        tiles = tiles + (tl.load(taps + SIGN * distance * C),)
    given = (tl.load(x + at, mask=inside & (i < T)[None, :], other=0.0),)
    for time in tl.static_range(1, TIMES):
        given = given + (tl.load(x + at + time * C, mask=inside & (time * C + i < T)[None, :], other=0.0),)
    for time in tl.static_range(TIMES):
        total = tl.dot(given[time], tiles[0], input_precision=PRECISION)
        for distance in tl.static_range(1, DISTANCES):
            if (time - SIGN * distance >= 0) and (time - SIGN * distance < TIMES):
                total = tl.dot(given[time - SIGN * distance], tiles[distance], total, input_precision=PRECISION)
        mask = inside & (time * C + i < T)[None, :]
        tl.store(out + at + time * C, total.to(out.dtype.element_ty), mask=mask)


@kernel
def pairs_short_kernel(
    dy, u, pairs, T, batch, parts, steps,
    D: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, TIMES: tl.constexpr, DISTANCES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As pairs_kernel of all distances between the TIMES blocks of short sequences, each of which is loaded once."""
    wait_for_earlier()
    part = tl.program_id(0) % parts
    channel = tl.cast(tl.program_id(0) // parts, tl.int64)
    d, group = channel % D, channel // D
    i = tl.arange(0, C)
    totals = (tl.zeros((C, C), tl.float32),)
    for _ in tl.static_range(1, DISTANCES):
        totals = totals + (tl.zeros((C, C), tl.float32),)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(batch, ROWS))):
        row = step * ROWS + tl.arange(0, ROWS)
        at = ((group * batch + row) * D + d)[:, None] * T + i[None, :]
        inside = (row < batch)[:, None]
        before = ()
        for time in tl.static_range(TIMES):
            mask = inside & (time * C + i < T)[None, :]
            before = before + (tl.load(u + at + time * C, mask=mask, other=0.0),)
            b_dy = tl.trans(tl.load(dy + at + time * C, mask=mask, other=0.0))
            sums = ()
            for distance in tl.static_range(DISTANCES):
                if distance <= time:
                    total = tl.dot(b_dy, before[time - distance], totals[distance], input_precision=PRECISION)
                    sums = sums + (total,)
                else:
                    sums = sums + (totals[distance],)
            totals = sums
    for distance in tl.static_range(DISTANCES):
        to = pairs + ((channel * DISTANCES + distance) * parts + part) * C * C
        tl.store(to + i[:, None] * C + i[None, :], totals[distance])


@kernel
def pairs_kernel(
    dy, u, pairs, Y, U, past, batch, distances, parts, steps,
    D: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pairs (groups, D, distances, parts, C, C): dy_p u_q where p - q = distance * C + row - column, summed.

    One program a channel, distance and part of the sequences: `steps` blocks of ROWS of them.
    """
    wait_for_earlier()
    part = tl.program_id(0) % parts
    rest = tl.program_id(0) // parts
    distance = rest % distances
    rest = tl.cast(rest // distances, tl.int64)
    d, group = rest % D, rest // D
    i = tl.arange(0, C)
    total = tl.zeros((C, C), tl.float32)
    # The first block of p that reaches an input.
    for p in range(tl.maximum(distance * C - past, 0) // C * C, Y, C):
        q = p + past - distance * C + i
        for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(batch, ROWS))):
            row = step * ROWS + tl.arange(0, ROWS)
            sequence = (group * batch + row) * D + d
            inside = (row < batch)[:, None]
            b_dy = tl.load(dy + sequence[:, None] * Y + (p + i)[None, :], mask=inside & (p + i < Y)[None, :], other=0.0)
            b_u = tl.load(
                u + sequence[:, None] * U + q[None, :], mask=inside & ((q >= 0) & (q < U))[None, :], other=0.0
            )
            total = tl.dot(tl.trans(b_dy), b_u, total, input_precision=PRECISION)
    pairs += tl.cast(tl.program_id(0), tl.int64) * C * C
    tl.store(pairs + i[:, None] * C + i[None, :], total)


@kernel
def diagonals_kernel(pairs, dkernel, L, distances, parts, C: tl.constexpr):
    """dkernel (groups, D, L): sums of the diagonals of `pairs`. One program a channel and C lags."""
    wait_for_earlier()
    blocks = tl.cdiv(L, C)
    block = tl.program_id(0) % blocks
    channel = tl.cast(tl.program_id(0) // blocks, tl.int64)
    pairs += (channel * distances + block) * parts * C * C
    row = tl.arange(0, C)[:, None]
    # Lags from row - column = lag at this distance, and from lag - C at the next.
    column = row - tl.arange(0, C)[None, :]
    total = tl.zeros((C, C), tl.float32)
    for part in range(parts):
        total += tl.load(pairs + part * C * C + row * C + column, mask=column >= 0, other=0.0)
        if block + 1 < distances:
            beyond = pairs + (parts + part) * C * C + row * C + column + C
            total += tl.load(beyond, mask=column < 0, other=0.0)
    lag = block * C + tl.arange(0, C)
    tl.store(dkernel + channel * L + lag, tl.sum(total, 0), mask=lag < L)
