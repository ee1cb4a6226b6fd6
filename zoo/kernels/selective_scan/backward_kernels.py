"""The walk back. With a_t = exp(dt_t A) and G_t = dL/dh_t,

    G_t = a_{t+1} G_{t+1} + C_t dy_t         dA = sum_t dt_t (a_t h_{t-1} G_t)

The forward keeps the state before each chunk. From it a_t h_{t-1} within the chunk are made once more, and held in
registers. Sums over channels, dB and dC, are matrix products, see `over_channels`. A thread has all the registers there
are: more warps with fewer of them, or with fewer states each, were slower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.selective_scan.kernels import (
    channels,
    four_rows,
    indices,
    load_step_rows,
    load_steps,
    load_terms,
    moved,
    over_states,
    sigmoid,
    spread,
    steps_of,
)
from zoo.kernels.tiles import LOG2E


@triton.jit
def slope_of_softplus(x, y, EXACT: tl.constexpr):
    """y = softplus(x); if not EXACT, right to 1e-7 of the largest slope, 1."""
    return sigmoid(x) if EXACT else 1 - tl.exp2(y * -LOG2E)


@triton.jit
def all_zero(steps):
    """Whether no step has an element other than zero, as NaN is."""
    other = steps[0] != 0
    for i in tl.static_range(1, len(steps)):
        other = other | (steps[i] != 0)
    return tl.max(tl.max(other.to(tl.int32), 1), 0) == 0


@triton.jit
def in_pairs(v, dtype: tl.constexpr):
    """Four steps of (LANES, NT), the same for all NT, -> (LANES / 2, 8): column 2 step + channel % 2."""
    LANES: tl.constexpr = v[0].shape[0]
    # Not joined, from which Triton would conclude that the matrix product's operands were of 8 bits once.
    i = tl.arange(0, 4)[None, :]
    tile = tl.where(i == 0, tl.max(v[0], 1)[:, None], tl.max(v[1], 1)[:, None])
    tile = tl.where(i < 2, tile, tl.where(i == 2, tl.max(v[2], 1)[:, None], tl.max(v[3], 1)[:, None]))
    tile = tl.permute(tl.reshape(tile.to(dtype), (LANES // 2, 2, 4)), (0, 2, 1))
    return tl.reshape(tile, (LANES // 2, 8))


@triton.jit
def only(a, b):
    return a


@triton.jit
def in_rows(x, dtype: tl.constexpr):
    """(LANES, NT, NK, NI) -> (LANES / 2, 2, N)."""
    return tl.reshape(x.to(dtype), (x.shape[0] // 2, 2, x.shape[1] * x.shape[2] * x.shape[3]))


@triton.jit
def over_channels(a, b, pairs, PRECISION: tl.constexpr):
    """sum_d x_nd v_d of two steps' x (LANES / 2, 2, N), v as `in_pairs` has it -> (2 N, 8) each, for `store_sums`.

    Channels go in pairs, both steps of one beside those of the other: where neighbouring threads lie along the rows of
    a matrix, Triton lets each store all its states at once in shared memory, from which tensor cores take it; in this
    order no two of them want the same bank.
    """
    K: tl.constexpr = a.shape[0]
    N: tl.constexpr = a.shape[2]
    # The reduction of an axis of 1 hides the joining, from which Triton would conclude that x was of 8 bits once.
    x = tl.reduce(tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (K, 4 * N, 1)), 2, only)
    sums = tl.dot(tl.trans(x), pairs, input_precision=PRECISION)
    first, second = tl.split(tl.permute(tl.reshape(sums, (2, 2, N, 8)), (0, 2, 3, 1)))
    return tl.reshape(first, (2 * N, 8)), tl.reshape(second, (2 * N, 8))


@triton.jit
def store_sums(M, sums, live, N: tl.constexpr, PADDED: tl.constexpr):
    """The products of even channels with even ones, and of odd with odd, of each step together: (steps, N)."""
    parity = tl.arange(0, 2 * PADDED)[:, None] // PADDED
    sums = tl.where(parity == tl.arange(0, 8)[None, :] % 2, sums, 0.0)
    sums = tl.sum(tl.sum(tl.reshape(sums, (2, PADDED, 4, 2)), 3), 0)
    n, i = tl.arange(0, PADDED)[:, None], tl.arange(0, 4)[None, :]
    tl.store(M + i * N + n, sums, mask=(n < N) & (i < live))


@kernel
def backward_kernel(
    x, dt, A, B, C, skip, z, bias, ungated, kept, dy, dlast, dx, ddt, dA, dB, dC, dskip, dz, dbias, dfirst,
    T, per_group, part, x_b, dt_b, B_b, C_b, z_b, dy_b,
    x_t: tl.constexpr, dt_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr, z_t: tl.constexpr, dy_t: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr,
    LANES: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr,
    DT_BY_STEP: tl.constexpr, B_BY_STEP: tl.constexpr, C_BY_STEP: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what sequences share are parts with a leading batch axis; dB and dC by step have one part of `part`
    elements, (B, T, N), for each block of channels.
    """
    wait_for_earlier()
    block, b, d, state, inside = indices(D, N, NT, NK, NI, LANES)
    PADDED: tl.constexpr = NT * NK * NI
    # Of the operands of matrix products.
    DTYPE: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.bfloat16 else tl.float32
    group = b // per_group
    chunks = tl.cdiv(T, S)
    # One of the threads that hold the same sums stores them.
    storing = (tl.arange(0, NT) == 0)[None, :]
    # All point to the first step of a chunk, the last one to begin with.
    latest = (chunks - 1) * S
    last = tl.cast(latest, tl.int64)
    dy += b * dy_b + last * dy_t
    dx += (b * T + last) * D
    dz += (b * T + last) * D
    if DT_BY_STEP:
        ddt += (b * T + last) * D
    if B_BY_STEP:
        dB += tl.cast(block, tl.int64) * part + (b * T + last) * N
    if C_BY_STEP:
        dC += tl.cast(block, tl.int64) * part + (b * T + last) * N
    # Nothing depends on what comes after the last output that has a gradient.
    if not HAS_LAST:
        zeros = tl.zeros((2 * PADDED, 8), tl.float32)
        while (latest > 0) & all_zero(load_steps(dy, dy_t, d, T - latest, D, S, WHOLE)):
            for i in tl.static_range(S):
                here = storing & channels(d, i, T - latest, D, WHOLE)
                tl.store(dx + i * D + d, 0.0, mask=here)
                if HAS_GATE:
                    tl.store(dz + i * D + d, 0.0, mask=here)
                if DT_BY_STEP:
                    tl.store(ddt + i * D + d, 0.0, mask=here)
            dx -= S * D
            dz -= S * D
            if DT_BY_STEP:
                ddt -= S * D
            if B_BY_STEP:
                store_sums(dB, zeros, T - latest, N, PADDED)
                dB -= S * N
            if C_BY_STEP:
                store_sums(dC, zeros, T - latest, N, PADDED)
                dC -= S * N
            dy -= S * dy_t
            latest -= S
    last = tl.cast(latest, tl.int64)
    x += b * x_b + last * x_t
    z += b * z_b + last * z_t
    ungated += (b * T + last) * D
    kept += (b * chunks + last // S) * D * N
    b_A = tl.load(A + group * D * N + state, mask=inside, other=0.0).to(tl.float32) * LOG2E
    b_dA = tl.zeros((LANES, NT, NK, NI), tl.float32)
    b_bias = tl.load(bias + group * D + d, mask=d < D, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    sum_dbias = tl.zeros((LANES, NT), tl.float32)
    if HAS_SKIP:
        b_skip = tl.load(skip + group * D + d, mask=d < D, other=0.0).to(tl.float32)
        sum_dskip = tl.zeros((LANES, NT), tl.float32)
    if DT_BY_STEP:
        dt += b * dt_b + last * dt_t
        next_dts = load_steps(dt, dt_t, d, T - last, D, S, WHOLE)
    else:
        b_dt = tl.load(dt + group * D + d, mask=d < D, other=0.0).to(tl.float32)
        sum_ddt = tl.zeros((LANES, NT), tl.float32)
    # The column of each step in sums over channels.
    column = tl.arange(0, 8)[None, :] // 2
    if B_BY_STEP:
        B += b * B_b + last * B_t
    else:
        b_B = tl.load(B + group * D * N + state, mask=inside, other=0.0).to(tl.float32)
        sum_dB = tl.zeros((LANES, NT, NK, NI), tl.float32)
    if C_BY_STEP:
        C += b * C_b + last * C_t
    else:
        b_C = tl.load(C + group * D * N + state, mask=inside, other=0.0).to(tl.float32)
        sum_dC = tl.zeros((LANES, NT, NK, NI), tl.float32)
    # What the threads exchange: B and C, or twice the one of them that is by step.
    P, Q = B if B_BY_STEP else C, C if C_BY_STEP else B
    P_t: tl.constexpr = B_t if B_BY_STEP else C_t
    Q_t: tl.constexpr = C_t if C_BY_STEP else B_t
    PQ = four_rows(P, Q, P_t, Q_t, PADDED)
    # B of all steps of a chunk, once more for the states.
    row = tl.arange(0, 4)[:, None]
    all_B_at = P + row * P_t + tl.arange(0, PADDED)[None, :]
    # a_{t+1} G_{t+1}
    carry = tl.zeros((LANES, NT, NK, NI), tl.float32)
    if HAS_LAST:
        carry = tl.load(dlast + b * D * N + state, mask=inside, other=0.0)

    next_h = tl.load(kept + state, mask=inside, other=0.0)
    next_xs = load_steps(x, x_t, d, T - last, D, S, WHOLE)
    if B_BY_STEP or C_BY_STEP:
        next_terms = load_terms(PQ, T - last, P_t, Q_t, N, S, WHOLE)
    if B_BY_STEP:
        next_Bs = load_step_rows(all_B_at, row, 0, T - last, P_t, P_t, N, WHOLE)
    next_dys = load_steps(dy, dy_t, d, T - last, D, S, WHOLE)
    if HAS_GATE:
        next_zs = load_steps(z, z_t, d, T - last, D, S, WHOLE)
        next_ys = load_steps(ungated, D, d, T - last, D, S, WHOLE)
    for start in range(latest, -1, -S):
        live = T - start
        xs, dys = next_xs, next_dys
        if HAS_GATE:
            zs, ys = next_zs, next_ys
        if B_BY_STEP or C_BY_STEP:
            terms = next_terms
        if B_BY_STEP:
            Bs = next_Bs
        if DT_BY_STEP:
            raw = next_dts
            dts = steps_of(raw, b_bias, live, S, HAS_BIAS, WHOLE)
        us, gated = (), ()
        for i in tl.static_range(S):
            b_dy = dys[i].to(tl.float32)
            if HAS_GATE:
                b_z = zs[i].to(tl.float32)
                gate = sigmoid(b_z)
                b_z *= gate
                b_dz = b_dy * ys[i].to(tl.float32) * (gate + b_z - b_z * gate)
                here = storing & channels(d, i, live, D, WHOLE)
                tl.store(dz + i * D + d, b_dz.to(dz.dtype.element_ty), mask=here)
                b_dy *= b_z
            if DT_BY_STEP:
                b_dt = dts[i]
            gated = gated + (b_dy,)  # type: ignore[assignment]  # noqa: RUF005
            us = us + (b_dt * xs[i].to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        if B_BY_STEP:
            u_pairs = in_pairs(us, DTYPE)
            tile_dB = tl.zeros((2 * PADDED, 8), tl.float32)
        if C_BY_STEP:
            dy_pairs = in_pairs(gated, DTYPE)
            tile_dC = tl.zeros((2 * PADDED, 8), tl.float32)
        h = next_h.to(tl.float32)
        # a_t and a_t h_{t-1}; h_t and G_t for sums over channels.
        decays, decayed, hs, Gs = (), (), (), ()
        for i in tl.static_range(S):
            if DT_BY_STEP:
                b_dt = dts[i]
            if B_BY_STEP:
                if i == 0:
                    all_B = spread(Bs, NT, NK, NI, LANES)
                b_B = all_B[i]
            decay = tl.exp2(b_dt[:, :, None, None] * b_A)
            decayed = decayed + (decay * h,)  # type: ignore[assignment]  # noqa: RUF005
            h = decayed[i] + us[i][:, :, None, None] * b_B
            decays = decays + (decay,)  # type: ignore[assignment]  # noqa: RUF005
            if C_BY_STEP:
                hs = hs + (in_rows(h, DTYPE),)  # type: ignore[assignment]  # noqa: RUF005
                if i % 2 == 1:
                    even, odd = over_channels(hs[i - 1], hs[i], dy_pairs, PRECISION)
                    tile_dC = tl.where(column == i - 1, even, tl.where(column == i, odd, tile_dC))
            else:
                sum_dC += h * gated[i][:, :, None, None]
        for i in tl.static_range(S - 1, -1, -1):
            here = storing & channels(d, i, live, D, WHOLE)
            if (B_BY_STEP or C_BY_STEP) and i % 2 == 1:
                two = spread(terms[i // 2], NT, NK, NI, LANES)
            if B_BY_STEP:
                b_B = two[i % 2 * 2]
            if C_BY_STEP:
                b_C = two[i % 2 * 2 + 1]
            if DT_BY_STEP:
                b_dt = dts[i]
            b_x, b_dy = xs[i].to(tl.float32), gated[i]
            G = carry + b_C * b_dy[:, :, None, None]
            du = over_states(G * b_B)
            if B_BY_STEP:
                Gs = Gs + (in_rows(G, DTYPE),)  # type: ignore[assignment]  # noqa: RUF005
                if i % 2 == 0:
                    odd, even = over_channels(Gs[2 - i], Gs[3 - i], u_pairs, PRECISION)
                    tile_dB = tl.where(column == i, even, tl.where(column == i + 1, odd, tile_dB))
            else:
                sum_dB += G * us[i][:, :, None, None]
            b_dx = b_dt * du
            if HAS_SKIP:
                b_dx += b_skip * b_dy
                sum_dskip += b_dy * b_x
            tl.store(dx + i * D + d, b_dx.to(dx.dtype.element_ty), mask=here)
            slope = G * decayed[i]
            # 1 / LOG2E
            b_ddt = over_states(slope * b_A) * 0.6931471805599453 + du * b_x
            if DT_BY_STEP:
                # Past the end dt is zero, and so the carry stays as it is.
                b_dA += b_dt[:, :, None, None] * slope
                carry = decays[i] * G
                if HAS_BIAS:
                    b_ddt *= slope_of_softplus(raw[i].to(tl.float32) + b_bias, b_dt, raw[i].dtype == tl.float32)
                    sum_dbias += b_ddt if WHOLE else tl.where(i < live, b_ddt, 0.0)
                tl.store(ddt + i * D + d, b_ddt.to(ddt.dtype.element_ty), mask=here)
            else:
                sum_ddt += tl.where(i < live, b_ddt, 0.0)
                b_dA += tl.where(i < live, b_dt[:, :, None, None] * slope, 0.0)
                carry = tl.where(i < live, decays[i] * G, carry)
            # As early as registers are free.
            if i == S // 2:
                # To the chunk before; from the first one nowhere: what is loaded there again is not used.
                back = tl.where(start > 0, S, 0)
                kept -= back // S * D * N
                next_h = tl.load(kept + state, mask=inside, other=0.0)
                x -= back * x_t
                next_xs = load_steps(x, x_t, d, live + back, D, S, WHOLE)
                if B_BY_STEP or C_BY_STEP:
                    PQ = moved(PQ, -back, P_t, Q_t)
                    next_terms = load_terms(PQ, live + back, P_t, Q_t, N, S, WHOLE)
                if B_BY_STEP:
                    all_B_at -= back * P_t
                    next_Bs = load_step_rows(all_B_at, row, 0, live + back, P_t, P_t, N, WHOLE)
                dy -= back * dy_t
                next_dys = load_steps(dy, dy_t, d, live + back, D, S, WHOLE)
                if HAS_GATE:
                    z -= back * z_t
                    next_zs = load_steps(z, z_t, d, live + back, D, S, WHOLE)
                    ungated -= back * D
                    next_ys = load_steps(ungated, D, d, live + back, D, S, WHOLE)
                if DT_BY_STEP:
                    dt -= back * dt_t
                    next_dts = load_steps(dt, dt_t, d, live + back, D, S, WHOLE)
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


@kernel
def sum_kernel(parts, sums, numbers, sizes, ends, ROWS: tl.constexpr, LOADED: tl.constexpr):
    """sums[i] (groups, sizes[i]) of parts[i] (groups, numbers[i], sizes[i]) by the programs before ends[i]."""
    wait_for_earlier()
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
