"""One program a sequence and block of channels walks time with the states of its channels in registers.

A tile of states is (ROWS, N, LANES) for the channels row * LANES + lane. With 8 lanes the 32 threads of a warp are 4
states of 8 channels each: sums over the states (y, dx, ddt) and over the channels (dB, dC) both take few exchanges
between threads.

With a_t = exp(dt_t A) and G_t = dL/dh_t,

    h_t = a_t h_{t-1} + dt_t B_t x_t         y_t = C_t . h_t + D x_t
    G_t = a_{t+1} G_{t+1} + C_t dy_t         dA = sum_t dt_t (a_t h_{t-1} G_t)

The forward keeps the state before each chunk of steps. The backward makes those within a chunk from it, holds them in
registers, and walks the chunk back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import LOG2E


@triton.jit
def load_channels(x, d, end):
    """(ROWS, LANES), zeros from channel `end` on."""
    return tl.load(x + d, mask=d < end, other=0.0).to(tl.float32)


@triton.jit
def load_states(M, n, end):
    """(1, N, 1), what all channels share; zeros from state `end` on."""
    return tl.load(M + n, mask=n < end, other=0.0).to(tl.float32)[None, :, None]


@triton.jit
def indices(D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The channels and states of this program, where they lie in (D, N), which of them there are; the sequence."""
    blocks: tl.constexpr = (D + ROWS * LANES - 1) // (ROWS * LANES)
    block = tl.program_id(0) % blocks
    b = tl.cast(tl.program_id(0) // blocks, tl.int64)
    d = (block * ROWS + tl.arange(0, ROWS)[:, None]) * LANES + tl.arange(0, LANES)[None, :]
    n = tl.arange(0, BLOCK_N)
    state = d[:, None, :] * N + n[None, :, None]
    inside = (d < D)[:, None, :] & (n < N)[None, :, None]
    return b, block, d, n, state, inside


@triton.jit
def forward_kernel(
    x, dt, A, B, C, skip, z, first, y, last, kept, T, per_group,
    x_b, x_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t,
    D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, S: tl.constexpr,
    DT_BY_STEP: tl.constexpr, B_BY_STEP: tl.constexpr, C_BY_STEP: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """kept (B, chunks, D, N): the state before each chunk of S steps."""
    b, _, d, n, state, inside = indices(D, N, BLOCK_N, ROWS, LANES)
    group = b // per_group
    x += b * x_b
    dt += b * dt_b if DT_BY_STEP else group * D
    B += b * B_b if B_BY_STEP else group * D * N
    C += b * C_b if C_BY_STEP else group * D * N
    z += b * z_b
    y += b * T * D
    kept += b * tl.cdiv(T, S) * D * N + state
    b_A = tl.load(A + group * D * N + state, mask=inside, other=0.0).to(tl.float32) * LOG2E
    b_dt = load_channels(dt, d, D)
    if not B_BY_STEP:
        b_B = tl.load(B + state, mask=inside, other=0.0).to(tl.float32)
    if not C_BY_STEP:
        b_C = tl.load(C + state, mask=inside, other=0.0).to(tl.float32)
    if HAS_SKIP:
        b_skip = load_channels(skip + group * D, d, D)
    h = tl.zeros((ROWS, BLOCK_N, LANES), tl.float32)
    if HAS_FIRST:
        h = tl.load(first + b * D * N + state, mask=inside, other=0.0)

    for t in range(T):
        if KEEP:  # noqa: SIM102 - decided as the kernel is compiled
            if t % S == 0:
                tl.store(kept, h, mask=inside)
                kept += D * N
        b_x = load_channels(x, d, D)
        if DT_BY_STEP:
            b_dt = load_channels(dt, d, D)
            dt += dt_t
        if B_BY_STEP:
            b_B = load_states(B, n, N)
            B += B_t
        if C_BY_STEP:
            b_C = load_states(C, n, N)
            C += C_t
        h = tl.exp2(b_dt[:, None, :] * b_A) * h + (b_dt * b_x)[:, None, :] * b_B
        b_y = tl.sum(h * b_C, 1)
        if HAS_SKIP:
            b_y += b_skip * b_x
        if HAS_GATE:
            b_z = load_channels(z, d, D)
            b_y *= b_z * tl.sigmoid(b_z)
            z += z_t
        tl.store(y + d, b_y.to(y.dtype.element_ty), mask=d < D)
        x += x_t
        y += D
    if HAS_LAST:
        tl.store(last + b * D * N + state, h, mask=inside)


@triton.jit
def backward_kernel(
    x, dt, A, B, C, skip, z, kept, dy, dlast, dx, ddt, dA, dB, dC, dskip, dz, dfirst, T, per_group, part,
    x_b, x_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t, dy_b, dy_t,
    D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, S: tl.constexpr,
    DT_BY_STEP: tl.constexpr, B_BY_STEP: tl.constexpr, C_BY_STEP: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of what sequences share are parts with a leading batch axis; dB and dC by step have one part of `part`
    elements, (B, T, N), for each block of channels.
    """
    b, block, d, n, state, inside = indices(D, N, BLOCK_N, ROWS, LANES)
    group = b // per_group
    x += b * x_b
    dt += b * dt_b if DT_BY_STEP else group * D
    B += b * B_b if B_BY_STEP else group * D * N
    C += b * C_b if C_BY_STEP else group * D * N
    z += b * z_b
    dy += b * dy_b
    dx += b * T * D + d
    dz += b * T * D + d
    ddt += (b * T if DT_BY_STEP else b) * D + d
    dB += tl.cast(block, tl.int64) * part + b * T * N + n if B_BY_STEP else b * D * N + state
    dC += tl.cast(block, tl.int64) * part + b * T * N + n if C_BY_STEP else b * D * N + state
    chunks = tl.cdiv(T, S)
    kept += b * chunks * D * N + state
    b_A = tl.load(A + group * D * N + state, mask=inside, other=0.0).to(tl.float32) * LOG2E
    b_dt = load_channels(dt, d, D)
    b_dA = tl.zeros((ROWS, BLOCK_N, LANES), tl.float32)
    if not DT_BY_STEP:
        sum_ddt = tl.zeros((ROWS, LANES), tl.float32)
    if not B_BY_STEP:
        b_B = tl.load(B + state, mask=inside, other=0.0).to(tl.float32)
        sum_dB = tl.zeros((ROWS, BLOCK_N, LANES), tl.float32)
    if not C_BY_STEP:
        b_C = tl.load(C + state, mask=inside, other=0.0).to(tl.float32)
        sum_dC = tl.zeros((ROWS, BLOCK_N, LANES), tl.float32)
    if HAS_SKIP:
        b_skip = load_channels(skip + group * D, d, D)
        sum_dskip = tl.zeros((ROWS, LANES), tl.float32)
    # a_{t+1} G_{t+1}
    carry = tl.zeros((ROWS, BLOCK_N, LANES), tl.float32)
    if HAS_LAST:
        carry = tl.load(dlast + b * D * N + state, mask=inside, other=0.0)

    for chunk in range(chunks):
        start = tl.cast(chunks - 1 - chunk, tl.int64) * S
        h = tl.load(kept + (start // S) * D * N, mask=inside, other=0.0)
        states = (h,)
        for i in tl.static_range(S - 1):
            # Steps past the end load zeros. Where dt is not loaded, the way back leaves them out.
            t = start + i
            b_x = load_channels(x + t * x_t, d, tl.where(t < T, D, 0))
            if DT_BY_STEP:
                b_dt = load_channels(dt + t * dt_t, d, tl.where(t < T, D, 0))
            if B_BY_STEP:
                b_B = load_states(B + t * B_t, n, tl.where(t < T, N, 0))
            h = tl.exp2(b_dt[:, None, :] * b_A) * h + (b_dt * b_x)[:, None, :] * b_B
            states = states + (h,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
        for i in tl.static_range(S):
            t = start + (S - 1 - i)
            end = tl.where(t < T, D, 0)
            states_end = tl.where(t < T, N, 0)
            b_x = load_channels(x + t * x_t, d, end)
            b_dy = load_channels(dy + t * dy_t, d, end)
            if DT_BY_STEP:
                b_dt = load_channels(dt + t * dt_t, d, end)
            if B_BY_STEP:
                b_B = load_states(B + t * B_t, n, states_end)
            if C_BY_STEP:
                b_C = load_states(C + t * C_t, n, states_end)
            u = b_dt * b_x
            a = tl.exp2(b_dt[:, None, :] * b_A)
            decayed = a * states[S - 1 - i]
            h = decayed + u[:, None, :] * b_B
            if HAS_GATE:
                b_z = load_channels(z + t * z_t, d, end)
                gate = tl.sigmoid(b_z)
                b_y = tl.sum(h * b_C, 1)
                if HAS_SKIP:
                    b_y += b_skip * b_x
                b_dz = b_dy * b_y * gate * (1 + b_z * (1 - gate))
                tl.store(dz + t * D, b_dz.to(dz.dtype.element_ty), mask=d < end)
                b_dy *= b_z * gate
            G = carry + b_C * b_dy[:, None, :]
            du = tl.sum(G * b_B, 1)
            b_dx = b_dt * du
            if HAS_SKIP:
                b_dx += b_skip * b_dy
                sum_dskip += b_dy * b_x
            tl.store(dx + t * D, b_dx.to(dx.dtype.element_ty), mask=d < end)
            if B_BY_STEP:
                b_dB = tl.sum(tl.sum(G * u[:, None, :], 2), 0)
                tl.store(dB + t * N, b_dB, mask=n < states_end)
            else:
                sum_dB += G * u[:, None, :]
            if C_BY_STEP:
                b_dC = tl.sum(tl.sum(h * b_dy[:, None, :], 2), 0)
                tl.store(dC + t * N, b_dC, mask=n < states_end)
            else:
                sum_dC += h * b_dy[:, None, :]
            slope = decayed * G
            # 1 / LOG2E
            b_ddt = tl.sum(slope * b_A, 1) * 0.6931471805599453 + du * b_x
            if DT_BY_STEP:
                b_dA += b_dt[:, None, :] * slope
                tl.store(ddt + t * D, b_ddt.to(ddt.dtype.element_ty), mask=d < end)
                carry = a * G
            else:
                sum_ddt += tl.where(t < T, b_ddt, 0.0)
                b_dA += tl.where(t < T, b_dt[:, None, :] * slope, 0.0)
                carry = tl.where(t < T, a * G, carry)

    tl.store(dA + b * D * N + state, b_dA, mask=inside)
    if not DT_BY_STEP:
        tl.store(ddt, sum_ddt, mask=d < D)
    if not B_BY_STEP:
        tl.store(dB, sum_dB, mask=inside)
    if not C_BY_STEP:
        tl.store(dC, sum_dC, mask=inside)
    if HAS_SKIP:
        tl.store(dskip + b * D + d, sum_dskip, mask=d < D)
    if HAS_FIRST:
        tl.store(dfirst + b * D * N + state, carry, mask=inside)
