"""One program a sequence and block of channels walks time with the states of its channels in registers.

A tile of states is (LANES, NT, NK, NI, ROWS): channel lane * ROWS + row, state (nt * NK + nk) * NI + ni. What has no
state axis is loaded as (LANES, NT, ROWS), what has no channel axis as (LANES, NT, NK, NI), so that each thread loads
what it needs and nothing is exchanged but the sums: over the states y, dx and ddt, over the channels dB and dC. Strides
of time are constants of the kernel, which spares it most of its integer arithmetic.

With a_t = exp(dt_t A) and G_t = dL/dh_t,

    h_t = a_t h_{t-1} + dt_t B_t x_t         y_t = C_t . h_t + D x_t
    G_t = a_{t+1} G_{t+1} + C_t dy_t         dA = sum_t dt_t (a_t h_{t-1} G_t)

The forward keeps the state before each chunk of S steps. The backward makes those within a chunk from it, holds them in
registers, and walks the chunk back. Both load a chunk or a step ahead of its use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import LOG2E


@triton.jit
def indices(
    D: tl.constexpr, N: tl.constexpr,
    NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The block, the sequence; channels; states; where both lie in (D, N), and which of them there are."""
    blocks: tl.constexpr = (D + ROWS * LANES - 1) // (ROWS * LANES)
    block = tl.program_id(0) % blocks
    b = tl.cast(tl.program_id(0) // blocks, tl.int64)
    lane = tl.arange(0, LANES)[:, None, None]
    d = (block * LANES + lane) * ROWS + tl.arange(0, ROWS)[None, None, :]
    d = tl.broadcast_to(d, (LANES, NT, ROWS))
    n = tl.arange(0, NT)[:, None, None] * NK + tl.arange(0, NK)[None, :, None]
    n = tl.broadcast_to((n * NI + tl.arange(0, NI)[None, None, :])[None], (LANES, NT, NK, NI))
    inside = (d < D)[:, :, None, None, :] & (n < N)[:, :, :, :, None]
    return block, b, d, n, d[:, :, None, None, :] * N + n[:, :, :, :, None], inside


@triton.jit
def load_step(x, index, live, size: tl.constexpr):
    """Zeros where not `live` and where index >= size."""
    return tl.load(x, mask=index < tl.where(live, size, 0), other=0.0)


@triton.jit
def load_steps(x, stride: tl.constexpr, index, start, T, S: tl.constexpr, size: tl.constexpr, BY_STEP: tl.constexpr):
    """A tuple of steps start, ..., start + S - 1; x points to the first. Not BY_STEP: of the one there is."""
    steps = (load_step(x, index, start < T, size),)
    if BY_STEP:
        for i in tl.static_range(1, S):
            steps = steps + (load_step(x + i * stride, index, start + i < T, size),)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
    return steps


@triton.jit
def step_of(steps, i: tl.constexpr, BY_STEP: tl.constexpr):
    return steps[i if BY_STEP else 0].to(tl.float32)


@triton.jit
def states_of(steps, i: tl.constexpr, BY_STEP: tl.constexpr):
    """(LANES, NT, NK, NI, 1), what all channels share; or the same at each step, (LANES, NT, NK, NI, ROWS)."""
    return steps[i].to(tl.float32)[:, :, :, :, None] if BY_STEP else steps[0].to(tl.float32)


@triton.jit
def load_shared(M, stride: tl.constexpr, n, start, inside, T, S: tl.constexpr, N: tl.constexpr, BY_STEP: tl.constexpr):
    """load_steps for B and C, which have the states of each channel where they are not BY_STEP."""
    return load_steps(M, stride, n, start, T, S, N, True) if BY_STEP else (tl.load(M, mask=inside, other=0.0),)


@triton.jit
def load_late(
    C, z, dy, C_t: tl.constexpr, z_t: tl.constexpr, dy_t: tl.constexpr, d, n, inside, start, T, i: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, C_BY_STEP: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """What only the way back needs of step start + i."""
    live = start + i < T
    b_dy = load_step(dy + i * dy_t, d, live, D)
    b_z = load_step(z + i * z_t, d, live, D) if HAS_GATE else b_dy
    return load_step(C + i * C_t, n, live, N) if C_BY_STEP else tl.load(C, mask=inside, other=0.0), b_z, b_dy


@triton.jit
def over_states(x):
    """(LANES, NT, NK, NI, ROWS) -> (LANES, NT, ROWS), the sum over all states."""
    sums = tl.sum(tl.sum(tl.sum(x, 3), 2), 1, keep_dims=True)
    return tl.broadcast_to(sums, (x.shape[0], x.shape[1], x.shape[4]))


@triton.jit
def over_channels(x):
    """(LANES, NT, NK, NI, ROWS) -> (LANES, NT, NK, NI), the sum over all channels."""
    sums = tl.sum(tl.sum(x, 4), 0, keep_dims=True)
    return tl.broadcast_to(sums, (x.shape[0], x.shape[1], x.shape[2], x.shape[3]))


@triton.jit
def forward_kernel(
    x, dt, A, B, C, skip, z, first, y, last, kept, T, per_group, x_b, dt_b, B_b, C_b, z_b,
    x_t: tl.constexpr, dt_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr, z_t: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, S: tl.constexpr,
    DT_BY_STEP: tl.constexpr, B_BY_STEP: tl.constexpr, C_BY_STEP: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """kept (B, chunks, D, N): the state before each chunk of S steps."""
    _, b, d, n, state, inside = indices(D, N, NT, NK, NI, ROWS, LANES)
    group = b // per_group
    x += b * x_b + d
    dt += (b * dt_b if DT_BY_STEP else group * D) + d
    B += b * B_b + n if B_BY_STEP else group * D * N + state
    C += b * C_b + n if C_BY_STEP else group * D * N + state
    z += b * z_b + d
    y += b * T * D + d
    # One of the threads that hold the same sums stores them.
    storing = (tl.arange(0, NT) == 0)[None, :, None]
    kept += b * tl.cdiv(T, S) * D * N + state
    b_A = tl.load(A + group * D * N + state, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if HAS_SKIP:
        b_skip = tl.load(skip + group * D + d, mask=d < D, other=0.0).to(tl.float32)
    h = tl.zeros((LANES, NT, NK, NI, ROWS), tl.float32)
    if HAS_FIRST:
        h = tl.load(first + b * D * N + state, mask=inside, other=0.0)

    xs = load_steps(x, x_t, d, 0, T, S, D, True)
    dts = load_steps(dt, dt_t, d, 0, T, S, D, DT_BY_STEP)
    Bs = load_shared(B, B_t, n, 0, inside, T, S, N, B_BY_STEP)
    Cs = load_shared(C, C_t, n, 0, inside, T, S, N, C_BY_STEP)
    zs = load_steps(z, z_t, d, 0, T, S, D, HAS_GATE)
    for start in range(0, T, S):
        if KEEP:
            tl.store(kept, h, mask=inside)
            kept += D * N
        x += S * x_t
        next_xs = load_steps(x, x_t, d, start + S, T, S, D, True)
        next_dts, next_Bs, next_Cs, next_zs = dts, Bs, Cs, zs
        if DT_BY_STEP:
            dt += S * dt_t
            next_dts = load_steps(dt, dt_t, d, start + S, T, S, D, True)
        if B_BY_STEP:
            B += S * B_t
            next_Bs = load_steps(B, B_t, n, start + S, T, S, N, True)
        if C_BY_STEP:
            C += S * C_t
            next_Cs = load_steps(C, C_t, n, start + S, T, S, N, True)
        if HAS_GATE:
            z += S * z_t
            next_zs = load_steps(z, z_t, d, start + S, T, S, D, True)
        for i in tl.static_range(S):
            b_x, b_dt = step_of(xs, i, True), step_of(dts, i, DT_BY_STEP)
            before = h
            h = tl.exp2(b_dt[:, :, None, None, :] * b_A) * h + (b_dt * b_x)[:, :, None, None, :] * states_of(
                Bs, i, B_BY_STEP
            )
            if HAS_LAST and not DT_BY_STEP:
                # Past the end x is zero, and dt as well if it is loaded.
                h = tl.where(start + i < T, h, before)
            b_y = over_states(h * states_of(Cs, i, C_BY_STEP))
            if HAS_SKIP:
                b_y += b_skip * b_x
            if HAS_GATE:
                b_z = step_of(zs, i, True)
                b_y *= b_z * tl.sigmoid(b_z)
            tl.store(y + i * D, b_y.to(y.dtype.element_ty), mask=storing & (d < tl.where(start + i < T, D, 0)))
        y += S * D
        xs, dts, Bs, Cs, zs = next_xs, next_dts, next_Bs, next_Cs, next_zs
    if HAS_LAST:
        tl.store(last + b * D * N + state, h, mask=inside)


@triton.jit
def backward_kernel(
    x, dt, A, B, C, skip, z, kept, dy, dlast, dx, ddt, dA, dB, dC, dskip, dz, dfirst, T, per_group, part,
    x_b, dt_b, B_b, C_b, z_b, dy_b, x_t: tl.constexpr, dt_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr,
    z_t: tl.constexpr, dy_t: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, S: tl.constexpr,
    DT_BY_STEP: tl.constexpr, B_BY_STEP: tl.constexpr, C_BY_STEP: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of what sequences share are parts with a leading batch axis; dB and dC by step have one part of `part`
    elements, (B, T, N), for each block of channels.
    """
    block, b, d, n, state, inside = indices(D, N, NT, NK, NI, ROWS, LANES)
    group = b // per_group
    x += b * x_b + d
    dt += (b * dt_b if DT_BY_STEP else group * D) + d
    B += b * B_b + n if B_BY_STEP else group * D * N + state
    C += b * C_b + n if C_BY_STEP else group * D * N + state
    z += b * z_b + d
    chunks = tl.cdiv(T, S)
    # From here on all of them point to the first step of a chunk, the last one to begin with.
    last = tl.cast(chunks - 1, tl.int64) * S
    x += last * x_t
    z += last * z_t
    dy += b * dy_b + last * dy_t + d
    dx += (b * T + last) * D + d
    dz += (b * T + last) * D + d
    ddt += (b * T + last if DT_BY_STEP else b) * D + d
    dB += tl.cast(block, tl.int64) * part + (b * T + last) * N + n if B_BY_STEP else b * D * N + state
    dC += tl.cast(block, tl.int64) * part + (b * T + last) * N + n if C_BY_STEP else b * D * N + state
    if DT_BY_STEP:
        dt += last * dt_t
    if B_BY_STEP:
        B += last * B_t
    if C_BY_STEP:
        C += last * C_t
    kept += (b * chunks + chunks - 1) * D * N + state
    # One of the threads that hold the same sums stores them.
    storing = (tl.arange(0, NT) == 0)[None, :, None]
    storing_n = (tl.arange(0, LANES) == 0)[:, None, None, None]
    b_A = tl.load(A + group * D * N + state, mask=inside, other=0.0).to(tl.float32) * LOG2E
    b_dA = tl.zeros((LANES, NT, NK, NI, ROWS), tl.float32)
    if not DT_BY_STEP:
        sum_ddt = tl.zeros((LANES, NT, ROWS), tl.float32)
    if not B_BY_STEP:
        sum_dB = tl.zeros((LANES, NT, NK, NI, ROWS), tl.float32)
    if not C_BY_STEP:
        sum_dC = tl.zeros((LANES, NT, NK, NI, ROWS), tl.float32)
    if HAS_SKIP:
        b_skip = tl.load(skip + group * D + d, mask=d < D, other=0.0).to(tl.float32)
        sum_dskip = tl.zeros((LANES, NT, ROWS), tl.float32)
    # a_{t+1} G_{t+1}
    carry = tl.zeros((LANES, NT, NK, NI, ROWS), tl.float32)
    if HAS_LAST:
        carry = tl.load(dlast + b * D * N + state, mask=inside, other=0.0)

    for chunk in range(chunks):
        start = (chunks - 1 - chunk) * S
        h = tl.load(kept, mask=inside, other=0.0)
        xs = load_steps(x, x_t, d, start, T, S, D, True)
        dts = load_steps(dt, dt_t, d, start, T, S, D, DT_BY_STEP)
        Bs = load_shared(B, B_t, n, start, inside, T, S, N, B_BY_STEP)
        late = load_late(C, z, dy, C_t, z_t, dy_t, d, n, inside, start, T, S - 1, D, N, C_BY_STEP, HAS_GATE)
        states = (h,)
        for i in tl.static_range(S):
            b_dt = step_of(dts, i, DT_BY_STEP)
            u = b_dt * step_of(xs, i, True)
            h = tl.exp2(b_dt[:, :, None, None, :] * b_A) * h + u[:, :, None, None, :] * states_of(Bs, i, B_BY_STEP)
            states = states + (h,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(S - 1, -1, -1):
            live = start + i < T
            end, end_n = tl.where(live, D, 0), tl.where(live, N, 0)
            b_C, b_z, b_dy = late
            if i > 0:
                late = load_late(C, z, dy, C_t, z_t, dy_t, d, n, inside, start, T, i - 1, D, N, C_BY_STEP, HAS_GATE)
            b_x, b_dt, b_B = step_of(xs, i, True), step_of(dts, i, DT_BY_STEP), states_of(Bs, i, B_BY_STEP)
            b_C, b_dy = states_of((b_C,), 0, C_BY_STEP), b_dy.to(tl.float32)
            if HAS_GATE:
                b_z = b_z.to(tl.float32)
                gate = tl.sigmoid(b_z)
                b_y = over_states(states[i + 1] * b_C)
                if HAS_SKIP:
                    b_y += b_skip * b_x
                b_dz = b_dy * b_y * gate * (1 + b_z * (1 - gate))
                tl.store(dz + i * D, b_dz.to(dz.dtype.element_ty), mask=storing & (d < end))
                b_dy *= b_z * gate
            u = b_dt * b_x
            G = carry + b_C * b_dy[:, :, None, None, :]
            du = over_states(G * b_B)
            if B_BY_STEP:
                tl.store(
                    dB + i * N,
                    over_channels(G * u[:, :, None, None, :]),
                    mask=storing_n & (n < end_n),
                )
            else:
                sum_dB += G * u[:, :, None, None, :]
            if C_BY_STEP:
                b_dC = over_channels(states[i + 1] * b_dy[:, :, None, None, :])
                tl.store(dC + i * N, b_dC, mask=storing_n & (n < end_n))
            else:
                sum_dC += states[i + 1] * b_dy[:, :, None, None, :]
            b_dx = b_dt * du
            if HAS_SKIP:
                b_dx += b_skip * b_dy
                sum_dskip += b_dy * b_x
            tl.store(dx + i * D, b_dx.to(dx.dtype.element_ty), mask=storing & (d < end))
            decayed = tl.exp2(b_dt[:, :, None, None, :] * b_A) * G
            slope = decayed * states[i]
            # 1 / LOG2E
            b_ddt = over_states(slope * b_A) * 0.6931471805599453 + du * b_x
            if DT_BY_STEP:
                # Past the end dt is zero, and so the carry stays as it is.
                b_dA += b_dt[:, :, None, None, :] * slope
                tl.store(ddt + i * D, b_ddt.to(ddt.dtype.element_ty), mask=storing & (d < end))
                carry = decayed
            else:
                sum_ddt += tl.where(live, b_ddt, 0.0)
                b_dA += tl.where(live, b_dt[:, :, None, None, :] * slope, 0.0)
                carry = tl.where(live, decayed, carry)
        kept -= D * N
        x -= S * x_t
        z -= S * z_t
        dy -= S * dy_t
        dx -= S * D
        dz -= S * D
        if DT_BY_STEP:
            dt -= S * dt_t
            ddt -= S * D
        if B_BY_STEP:
            B -= S * B_t
            dB -= S * N
        if C_BY_STEP:
            C -= S * C_t
            dC -= S * N

    tl.store(dA + b * D * N + state, b_dA, mask=inside)
    if not DT_BY_STEP:
        tl.store(ddt, sum_ddt, mask=storing & (d < D))
    if not B_BY_STEP:
        tl.store(dB, sum_dB, mask=inside)
    if not C_BY_STEP:
        tl.store(dC, sum_dC, mask=inside)
    if HAS_SKIP:
        tl.store(dskip + b * D + d, sum_dskip, mask=storing & (d < D))
    if HAS_FIRST:
        tl.store(dfirst + b * D * N + state, carry, mask=inside)
