"""One program a sequence and 32 channels walks time with the states of its channels in registers.

A tile of states is (LANES, NT, NK, NI): state (nt * NK + nk) * NI + ni. A thread has up to 16 states of one channel, so
that up to there the sums over states, y, dx and ddt, stay within it. What has no state axis is loaded as (LANES, NT).
Sums over channels, dB and dC, are matrix products, see `over_channels`. Strides of time are constants of the kernel,
and so is whether all chunks are whole, which spares it most of its integer arithmetic and masks.

With a_t = exp(dt_t A) and G_t = dL/dh_t,

    h_t = a_t h_{t-1} + dt_t B_t x_t         y_t = C_t . h_t + D x_t
    G_t = a_{t+1} G_{t+1} + C_t dy_t         dA = sum_t dt_t (a_t h_{t-1} G_t)

The forward keeps the state before each chunk of S = 4 steps. The backward makes those within a chunk from it, holds
them in registers, and walks the chunk back. Both load a chunk ahead of its use, B and C once for all threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import LOG2E


@triton.jit
def indices(
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The block, the sequence; channels; where channels and states lie in (D, N), and which of them there are."""
    blocks: tl.constexpr = (D + LANES - 1) // LANES
    block = tl.program_id(0) % blocks
    b = tl.cast(tl.program_id(0) // blocks, tl.int64)
    d = tl.broadcast_to(block * LANES + tl.arange(0, LANES)[:, None], (LANES, NT))
    n = tl.arange(0, NT)[:, None, None] * NK + tl.arange(0, NK)[None, :, None]
    n = tl.broadcast_to((n * NI + tl.arange(0, NI)[None, None, :])[None], (LANES, NT, NK, NI))
    inside = (d < D)[:, :, None, None] & (n < N)
    return block, b, d, d[:, :, None, None] * N + n, inside


@triton.jit
def channels(d, i: tl.constexpr, live, D: tl.constexpr, WHOLE: tl.constexpr):
    """The channels there are in step i of a chunk that has `live` of them; WHOLE: all chunks have all their steps."""
    return d < D if WHOLE else d < tl.where(i < live, D, 0)


@triton.jit
def load_steps(x, stride: tl.constexpr, d, live, D: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr):
    """A tuple of the S steps from x on; zeros past the end."""
    steps = ()
    for i in tl.static_range(S):
        step = tl.load(x + i * stride + d, mask=channels(d, i, live, D, WHOLE), other=0.0)
        steps = steps + (step,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
    return steps


@triton.jit
def load_two(
    P, Q, P_t: tl.constexpr, Q_t: tl.constexpr, i: tl.constexpr, j: tl.constexpr, live, N: tl.constexpr,
    PADDED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(2, PADDED), step i of P and j of Q. Past the end it is the last step: there x, dt and dy are zero.

    Two rows have as many elements as a warp has threads: those of one Triton would rather load in each thread anew.
    """
    n = tl.arange(0, PADDED)[None, :]
    if not WHOLE:
        P += tl.maximum(tl.minimum(i, live - 1), 0) * P_t
        Q += tl.maximum(tl.minimum(j, live - 1), 0) * Q_t
    else:
        P += i * P_t
        Q += j * Q_t
    return tl.load(tl.where((tl.arange(0, 2) == 0)[:, None], P + n, Q + n), mask=n < N, other=0.0)


@triton.jit
def load_terms(
    P, Q, P_t: tl.constexpr, Q_t: tl.constexpr, live, N: tl.constexpr, PADDED: tl.constexpr, S: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """P and Q of each step."""
    steps = ()
    for i in tl.static_range(S):
        steps = steps + (load_two(P, Q, P_t, Q_t, i, i, live, N, PADDED, WHOLE),)  # type: ignore[assignment]  # noqa: RUF005
    return steps


@triton.jit
def load_pairs(P, P_t: tl.constexpr, live, N: tl.constexpr, PADDED: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr):
    """P of each two steps."""
    steps = ()
    for i in tl.static_range(0, S, 2):
        steps = steps + (load_two(P, P, P_t, P_t, i, i + 1, live, N, PADDED, WHOLE),)  # type: ignore[assignment]  # noqa: RUF005
    return steps


@triton.jit
def spread(terms, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr, LANES: tl.constexpr):
    """B and C of one step for all channels, (LANES, NT, NK, NI) each."""
    terms = tl.reshape(tl.permute(terms.to(tl.float32), (1, 0)), (1, NT, NK, NI, 2))
    return tl.split(tl.broadcast_to(terms, (LANES, NT, NK, NI, 2)))


@triton.jit
def over_states(x):
    """(LANES, NT, NK, NI) -> (LANES, NT), the sum over all states."""
    sums = tl.sum(tl.sum(tl.sum(x, 3), 2), 1, keep_dims=True)
    return tl.broadcast_to(sums, (x.shape[0], x.shape[1]))


@triton.jit
def sigmoid(x):
    # A division costs more, for the sake of numbers that do not occur here.
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def softplus(x):
    # log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1 / 3: so many terms are right to the last bits, for small e too.
    e = tl.exp2(tl.abs(x) * -LOG2E)
    root = tl.rsqrt(2 + e)
    s = e * root * root
    q = s * s
    series = 1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))
    return tl.maximum(x, 0.0) + 2 * (s + s * q * (1 / 3 + q * series))


@triton.jit
def steps_of(dt, bias, live, S: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr):
    """The dt of each step of a chunk in fp32; none past the end."""
    steps = ()
    for i in tl.static_range(S):
        step = dt[i].to(tl.float32)
        if HAS_BIAS:
            step = softplus(step + bias)
            if not WHOLE:
                step = tl.where(i < live, step, 0.0)
        steps = steps + (step,)  # type: ignore[assignment]  # noqa: RUF005
    return steps


@triton.jit
def in_pairs(v, dtype: tl.constexpr):
    """Four steps of (LANES, NT), the same for all NT, -> (LANES / 2, 8): column 2 step + channel % 2."""
    LANES: tl.constexpr = v[0].shape[0]
    tile = tl.join(tl.join(tl.max(v[0], 1), tl.max(v[2], 1)), tl.join(tl.max(v[1], 1), tl.max(v[3], 1)))
    tile = tl.permute(tl.reshape(tile.to(dtype), (LANES // 2, 2, 4)), (0, 2, 1))
    return tl.reshape(tile, (LANES // 2, 8))


@triton.jit
def over_channels(x, pairs, PRECISION: tl.constexpr):
    """sum_d x_nd v_d: x (LANES, NT, NK, NI), v as `in_pairs` has it -> (2 N, 8), to be read by `store_sums`.

    Channels go in pairs, the states of one beside those of the other: where neighbouring threads lie along the rows of
    a matrix, Triton lets each store all its states at once in shared memory, from which tensor cores take it.
    """
    x = tl.reshape(x.to(pairs.dtype), (x.shape[0] // 2, 2 * x.shape[1] * x.shape[2] * x.shape[3]))
    return tl.dot(tl.trans(x), pairs, input_precision=PRECISION)


@triton.jit
def store_sums(M, sums, live, N: tl.constexpr, PADDED: tl.constexpr):
    """The products of even channels with even ones, and of odd with odd, of each step together: (steps, N)."""
    parity = tl.arange(0, 2 * PADDED)[:, None] // PADDED
    sums = tl.where(parity == tl.arange(0, 8)[None, :] % 2, sums, 0.0)
    sums = tl.sum(tl.sum(tl.reshape(sums, (2, PADDED, 4, 2)), 3), 0)
    n, i = tl.arange(0, PADDED)[:, None], tl.arange(0, 4)[None, :]
    tl.store(M + i * N + n, sums, mask=(n < N) & (i < live))


@triton.jit
def forward_kernel(
    x, dt, A, B, C, skip, z, bias, first, y, last, kept, T, per_group, x_b, dt_b, B_b, C_b, z_b,
    x_t: tl.constexpr, dt_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr, z_t: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr,
    LANES: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr,
    DT_BY_STEP: tl.constexpr, B_BY_STEP: tl.constexpr, C_BY_STEP: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """kept (B, chunks, D, N): the state before each chunk of S steps."""
    _, b, d, state, inside = indices(D, N, NT, NK, NI, LANES)
    PADDED: tl.constexpr = NT * NK * NI
    group = b // per_group
    x += b * x_b
    z += b * z_b
    y += b * T * D
    kept += b * tl.cdiv(T, S) * D * N
    # One of the threads that hold the same sums stores them.
    storing = (tl.arange(0, NT) == 0)[None, :]
    b_A = tl.load(A + group * D * N + state, mask=inside, other=0.0).to(tl.float32) * LOG2E
    b_bias = tl.load(bias + group * D + d, mask=d < D, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    if HAS_SKIP:
        b_skip = tl.load(skip + group * D + d, mask=d < D, other=0.0).to(tl.float32)
    if DT_BY_STEP:
        dt += b * dt_b
        next_dts = load_steps(dt, dt_t, d, T, D, S, WHOLE)
    else:
        b_dt = tl.load(dt + group * D + d, mask=d < D, other=0.0).to(tl.float32)
    if B_BY_STEP:
        B += b * B_b
    else:
        b_B = tl.load(B + group * D * N + state, mask=inside, other=0.0).to(tl.float32)
    if C_BY_STEP:
        C += b * C_b
    else:
        b_C = tl.load(C + group * D * N + state, mask=inside, other=0.0).to(tl.float32)
    # What the threads exchange: B and C, or twice the one of them that is by step.
    P, Q = B if B_BY_STEP else C, C if C_BY_STEP else B
    P_t: tl.constexpr = B_t if B_BY_STEP else C_t
    Q_t: tl.constexpr = C_t if C_BY_STEP else B_t
    h = tl.zeros((LANES, NT, NK, NI), tl.float32)
    if HAS_FIRST:
        h = tl.load(first + b * D * N + state, mask=inside, other=0.0)

    next_xs = load_steps(x, x_t, d, T, D, S, WHOLE)
    if B_BY_STEP or C_BY_STEP:
        next_terms = load_terms(P, Q, P_t, Q_t, T, N, PADDED, S, WHOLE)
    if HAS_GATE:
        next_zs = load_steps(z, z_t, d, T, D, S, WHOLE)
    for start in range(0, T, S):
        if KEEP:
            tl.store(kept + state, h.to(kept.dtype.element_ty), mask=inside)
            kept += D * N
        live = T - start
        # To the next chunk; from the last one nowhere: what is loaded there again is not used.
        ahead = tl.where(live > S, S, 0)
        xs = next_xs
        x += ahead * x_t
        next_xs = load_steps(x, x_t, d, live - S, D, S, WHOLE)
        if DT_BY_STEP:
            dts = steps_of(next_dts, b_bias, live, S, HAS_BIAS, WHOLE)
            dt += ahead * dt_t
            next_dts = load_steps(dt, dt_t, d, live - S, D, S, WHOLE)
        if HAS_GATE:
            zs = next_zs
            z += ahead * z_t
            next_zs = load_steps(z, z_t, d, live - S, D, S, WHOLE)
        if B_BY_STEP or C_BY_STEP:
            terms = next_terms
            P += ahead * P_t
            Q += ahead * Q_t
            next_terms = load_terms(P, Q, P_t, Q_t, live - S, N, PADDED, S, WHOLE)
        for i in tl.static_range(S):
            if B_BY_STEP or C_BY_STEP:
                step_B, step_C = spread(terms[i], NT, NK, NI, LANES)
            if B_BY_STEP:
                b_B = step_B
            if C_BY_STEP:
                b_C = step_C
            b_x = xs[i].to(tl.float32)
            if DT_BY_STEP:
                b_dt = dts[i]
            before = h
            h = tl.exp2(b_dt[:, :, None, None] * b_A) * h + (b_dt * b_x)[:, :, None, None] * b_B
            if HAS_LAST and not DT_BY_STEP:
                # Past the end x is zero, and dt as well if it is loaded.
                h = tl.where(i < live, h, before)
            b_y = over_states(h * b_C)
            if HAS_SKIP:
                b_y += b_skip * b_x
            if HAS_GATE:
                b_z = zs[i].to(tl.float32)
                b_y *= b_z * sigmoid(b_z)
            tl.store(y + i * D + d, b_y.to(y.dtype.element_ty), mask=storing & channels(d, i, live, D, WHOLE))
        y += S * D
    if HAS_LAST:
        tl.store(last + b * D * N + state, h, mask=inside)


@triton.jit
def backward_kernel(
    x, dt, A, B, C, skip, z, bias, kept, dy, dlast, dx, ddt, dA, dB, dC, dskip, dz, dbias, dfirst, T, per_group, part,
    x_b, dt_b, B_b, C_b, z_b, dy_b, x_t: tl.constexpr, dt_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr,
    z_t: tl.constexpr, dy_t: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr,
    LANES: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr,
    DT_BY_STEP: tl.constexpr, B_BY_STEP: tl.constexpr, C_BY_STEP: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what sequences share are parts with a leading batch axis; dB and dC by step have one part of `part`
    elements, (B, T, N), for each block of channels.
    """
    block, b, d, state, inside = indices(D, N, NT, NK, NI, LANES)
    PADDED: tl.constexpr = NT * NK * NI
    # Of the operands of matrix products.
    DTYPE: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.bfloat16 else tl.float32
    group = b // per_group
    chunks = tl.cdiv(T, S)
    # From here on all point to the first step of a chunk, the last one to begin with.
    last = tl.cast(chunks - 1, tl.int64) * S
    x += b * x_b + last * x_t
    z += b * z_b + last * z_t
    dy += b * dy_b + last * dy_t
    dx += (b * T + last) * D
    dz += (b * T + last) * D
    kept += (b * chunks + chunks - 1) * D * N
    # One of the threads that hold the same sums stores them.
    storing = (tl.arange(0, NT) == 0)[None, :]
    b_A = tl.load(A + group * D * N + state, mask=inside, other=0.0).to(tl.float32) * LOG2E
    b_dA = tl.zeros((LANES, NT, NK, NI), tl.float32)
    b_bias = tl.load(bias + group * D + d, mask=d < D, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    sum_dbias = tl.zeros((LANES, NT), tl.float32)
    if HAS_SKIP:
        b_skip = tl.load(skip + group * D + d, mask=d < D, other=0.0).to(tl.float32)
        sum_dskip = tl.zeros((LANES, NT), tl.float32)
    if DT_BY_STEP:
        dt += b * dt_b + last * dt_t
        ddt += (b * T + last) * D
        next_dts = load_steps(dt, dt_t, d, T - last, D, S, WHOLE)
    else:
        b_dt = tl.load(dt + group * D + d, mask=d < D, other=0.0).to(tl.float32)
        sum_ddt = tl.zeros((LANES, NT), tl.float32)
    # The column of each step in sums over channels.
    column = tl.arange(0, 8)[None, :] // 2
    if B_BY_STEP:
        B += b * B_b + last * B_t
        dB += tl.cast(block, tl.int64) * part + (b * T + last) * N
    else:
        b_B = tl.load(B + group * D * N + state, mask=inside, other=0.0).to(tl.float32)
        sum_dB = tl.zeros((LANES, NT, NK, NI), tl.float32)
    if C_BY_STEP:
        C += b * C_b + last * C_t
        dC += tl.cast(block, tl.int64) * part + (b * T + last) * N
    else:
        b_C = tl.load(C + group * D * N + state, mask=inside, other=0.0).to(tl.float32)
        sum_dC = tl.zeros((LANES, NT, NK, NI), tl.float32)
    # What the threads exchange: B and C, or twice the one of them that is by step.
    P, Q = B if B_BY_STEP else C, C if C_BY_STEP else B
    P_t: tl.constexpr = B_t if B_BY_STEP else C_t
    Q_t: tl.constexpr = C_t if C_BY_STEP else B_t
    # a_{t+1} G_{t+1}
    carry = tl.zeros((LANES, NT, NK, NI), tl.float32)
    if HAS_LAST:
        carry = tl.load(dlast + b * D * N + state, mask=inside, other=0.0)

    next_h = tl.load(kept + state, mask=inside, other=0.0)
    next_xs = load_steps(x, x_t, d, T - last, D, S, WHOLE)
    if B_BY_STEP or C_BY_STEP:
        next_terms = load_terms(P, Q, P_t, Q_t, T - last, N, PADDED, S, WHOLE)
    if B_BY_STEP:
        next_Bs = load_pairs(P, P_t, T - last, N, PADDED, S, WHOLE)
    next_dys = load_steps(dy, dy_t, d, T - last, D, S, WHOLE)
    if HAS_GATE:
        next_zs = load_steps(z, z_t, d, T - last, D, S, WHOLE)
    for chunk in range(chunks):
        start = (chunks - 1 - chunk) * S
        live = T - start
        xs, dys = next_xs, next_dys
        if HAS_GATE:
            zs = next_zs
        if B_BY_STEP or C_BY_STEP:
            terms = next_terms
        if B_BY_STEP:
            Bs = next_Bs
        if DT_BY_STEP:
            raw = next_dts
            dts = steps_of(raw, b_bias, live, S, HAS_BIAS, WHOLE)
        states = (next_h.to(tl.float32),)
        decays, us, gated, slopes = (), (), (), ()
        for i in tl.static_range(S):
            b_dy = dys[i].to(tl.float32)
            if HAS_GATE:
                b_z = zs[i].to(tl.float32)
                gate = sigmoid(b_z)
                b_z *= gate
                slopes = slopes + (b_dy * (gate + b_z - b_z * gate),)  # type: ignore[assignment]  # noqa: RUF005
                b_dy *= b_z
            gated = gated + (b_dy,)  # type: ignore[assignment]  # noqa: RUF005
        if C_BY_STEP:
            dy_pairs = in_pairs(gated, DTYPE)
            tile_dC = tl.zeros((2 * PADDED, 8), tl.float32)
        for i in tl.static_range(S):
            if DT_BY_STEP:
                b_dt = dts[i]
            if B_BY_STEP:
                even, odd = spread(Bs[i // 2], NT, NK, NI, LANES)
                b_B = even if i % 2 == 0 else odd
            u = b_dt * xs[i].to(tl.float32)
            decay = tl.exp2(b_dt[:, :, None, None] * b_A)
            states = states + (decay * states[i] + u[:, :, None, None] * b_B,)  # type: ignore[assignment]  # noqa: RUF005
            us = us + (u,)  # type: ignore[assignment]  # noqa: RUF005
            decays = decays + (decay,)  # type: ignore[assignment]  # noqa: RUF005
        # To the chunk before; from the first one nowhere: what is loaded there again is not used.
        back = tl.where(start > 0, S, 0)
        kept -= back // S * D * N
        next_h = tl.load(kept + state, mask=inside, other=0.0)
        x -= back * x_t
        next_xs = load_steps(x, x_t, d, live + back, D, S, WHOLE)
        if B_BY_STEP or C_BY_STEP:
            P -= back * P_t
            Q -= back * Q_t
            next_terms = load_terms(P, Q, P_t, Q_t, live + back, N, PADDED, S, WHOLE)
        if B_BY_STEP:
            next_Bs = load_pairs(P, P_t, live + back, N, PADDED, S, WHOLE)
        dy -= back * dy_t
        next_dys = load_steps(dy, dy_t, d, live + back, D, S, WHOLE)
        if HAS_GATE:
            z -= back * z_t
            next_zs = load_steps(z, z_t, d, live + back, D, S, WHOLE)
        if DT_BY_STEP:
            dt -= back * dt_t
            next_dts = load_steps(dt, dt_t, d, live + back, D, S, WHOLE)
        if B_BY_STEP:
            u_pairs = in_pairs(us, DTYPE)
            tile_dB = tl.zeros((2 * PADDED, 8), tl.float32)
        for i in tl.static_range(S - 1, -1, -1):
            here = storing & channels(d, i, live, D, WHOLE)
            if B_BY_STEP or C_BY_STEP:
                step_B, step_C = spread(terms[i], NT, NK, NI, LANES)
            if B_BY_STEP:
                b_B = step_B
            if C_BY_STEP:
                b_C = step_C
            if DT_BY_STEP:
                b_dt = dts[i]
            b_x, b_dy = xs[i].to(tl.float32), gated[i]
            if HAS_GATE:
                b_y = over_states(states[i + 1] * b_C)
                if HAS_SKIP:
                    b_y += b_skip * b_x
                tl.store(dz + i * D + d, (slopes[i] * b_y).to(dz.dtype.element_ty), mask=here)
            G = carry + b_C * b_dy[:, :, None, None]
            du = over_states(G * b_B)
            if B_BY_STEP:
                tile_dB = tl.where(column == i, over_channels(G, u_pairs, PRECISION), tile_dB)
            else:
                sum_dB += G * us[i][:, :, None, None]
            if C_BY_STEP:
                tile_dC = tl.where(column == i, over_channels(states[i + 1], dy_pairs, PRECISION), tile_dC)
            else:
                sum_dC += states[i + 1] * b_dy[:, :, None, None]
            b_dx = b_dt * du
            if HAS_SKIP:
                b_dx += b_skip * b_dy
                sum_dskip += b_dy * b_x
            tl.store(dx + i * D + d, b_dx.to(dx.dtype.element_ty), mask=here)
            decayed = decays[i] * G
            slope = decayed * states[i]
            # 1 / LOG2E
            b_ddt = over_states(slope * b_A) * 0.6931471805599453 + du * b_x
            if DT_BY_STEP:
                # Past the end dt is zero, and so the carry stays as it is.
                b_dA += b_dt[:, :, None, None] * slope
                carry = decayed
                if HAS_BIAS:
                    b_ddt *= sigmoid(raw[i].to(tl.float32) + b_bias)
                    sum_dbias += tl.where(i < live, b_ddt, 0.0)
                tl.store(ddt + i * D + d, b_ddt.to(ddt.dtype.element_ty), mask=here)
            else:
                sum_ddt += tl.where(i < live, b_ddt, 0.0)
                b_dA += tl.where(i < live, b_dt[:, :, None, None] * slope, 0.0)
                carry = tl.where(i < live, decayed, carry)
        dx -= S * D
        dz -= S * D
        if DT_BY_STEP:
            ddt -= S * D
        if B_BY_STEP:
            store_sums(dB, tile_dB, live, N, PADDED)
            dB -= S * N
        if C_BY_STEP:
            store_sums(dC, tile_dC, live, N, PADDED)
            dC -= S * N

    tl.store(dA + b * D * N + state, b_dA, mask=inside)
    if not DT_BY_STEP:
        tl.store(ddt + b * D + d, sum_ddt, mask=storing & (d < D))
    if not B_BY_STEP:
        tl.store(dB + b * D * N + state, sum_dB, mask=inside)
    if not C_BY_STEP:
        tl.store(dC + b * D * N + state, sum_dC, mask=inside)
    if HAS_SKIP:
        tl.store(dskip + b * D + d, sum_dskip, mask=storing & (d < D))
    if HAS_BIAS:
        tl.store(dbias + b * D + d, sum_dbias, mask=storing & (d < D))
    if HAS_FIRST:
        tl.store(dfirst + b * D * N + state, carry, mask=inside)


@triton.jit
def sum_kernel(parts, sums, numbers, sizes, ends, ROWS: tl.constexpr, LOADED: tl.constexpr):
    """sums[i] (groups, sizes[i]) of parts[i] (groups, numbers[i], sizes[i]) by the programs before ends[i]."""
    first = 0
    for i in tl.static_range(len(parts)):
        pid = tl.program_id(0) - first
        if (pid >= 0) & (tl.program_id(0) < ends[i]):
            LOADED_ROWS: tl.constexpr = ROWS[i]
            COLUMNS: tl.constexpr = LOADED // LOADED_ROWS
            blocks = tl.cdiv(sizes[i], COLUMNS)
            group = tl.cast(pid // blocks, tl.int64)
            column = pid % blocks * COLUMNS + tl.arange(0, COLUMNS)
            row = tl.arange(0, LOADED_ROWS)[:, None]
            at = parts[i] + (group * numbers[i] + row) * sizes[i] + column[None, :]
            total = tl.zeros((LOADED_ROWS, COLUMNS), tl.float32)
            for start in range(0, numbers[i], LOADED_ROWS):
                mask = (start + row < numbers[i]) & (column < sizes[i])[None, :]
                total += tl.load(at + tl.cast(start, tl.int64) * sizes[i], mask=mask, other=0.0)
            to = sums[i] + group * sizes[i] + column
            tl.store(to, tl.sum(total, 0).to(sums[i].dtype.element_ty), mask=column < sizes[i])
        first = ends[i]
