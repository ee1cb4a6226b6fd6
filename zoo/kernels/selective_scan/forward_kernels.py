"""The scan: h_t = a_t h_{t-1} + dt_t B_t x_t with a_t = exp(dt_t A), y_t = C_t . h_t + D x_t, and its gate."""

from __future__ import annotations

import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.selective_scan.kernels import (
    channels,
    four_rows,
    indices,
    load_steps,
    load_terms,
    moved,
    over_states,
    sigmoid,
    spread,
    steps_of,
)
from zoo.kernels.tiles import LOG2E


@kernel
def forward_kernel(
    x, dt, A, B, C, skip, z, bias, first, y, ungated, last, kept, T, per_group, x_b, dt_b, B_b, C_b, z_b,
    x_t: tl.constexpr, dt_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr, z_t: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr,
    LANES: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr,
    DT_BY_STEP: tl.constexpr, B_BY_STEP: tl.constexpr, C_BY_STEP: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """kept (B, chunks, D, N): the state before each chunk of S steps. ungated (B, T, D): y before its gate."""
    wait_for_earlier()
    _, b, d, state, inside = indices(D, N, NT, NK, NI, LANES)
    PADDED: tl.constexpr = NT * NK * NI
    group = b // per_group
    x += b * x_b
    z += b * z_b
    y += b * T * D
    ungated += b * T * D
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
    PQ = four_rows(P, Q, P_t, Q_t, PADDED)
    h = tl.zeros((LANES, NT, NK, NI), tl.float32)
    if HAS_FIRST:
        h = tl.load(first + b * D * N + state, mask=inside, other=0.0)

    next_xs = load_steps(x, x_t, d, T, D, S, WHOLE)
    if B_BY_STEP or C_BY_STEP:
        next_terms = load_terms(PQ, T, P_t, Q_t, N, S, WHOLE)
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
            PQ = moved(PQ, ahead, P_t, Q_t)
            next_terms = load_terms(PQ, live - S, P_t, Q_t, N, S, WHOLE)
        for i in tl.static_range(S):
            if (B_BY_STEP or C_BY_STEP) and i % 2 == 0:
                two = spread(terms[i // 2], NT, NK, NI, LANES)
            if B_BY_STEP:
                b_B = two[i % 2 * 2]
            if C_BY_STEP:
                b_C = two[i % 2 * 2 + 1]
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
            here = storing & channels(d, i, live, D, WHOLE)
            if HAS_GATE:
                if KEEP:
                    tl.store(ungated + i * D + d, b_y.to(ungated.dtype.element_ty), mask=here)
                b_z = zs[i].to(tl.float32)
                b_y *= b_z * sigmoid(b_z)
            tl.store(y + i * D + d, b_y.to(y.dtype.element_ty), mask=here)
        y += S * D
        ungated += S * D
    if HAS_LAST:
        tl.store(last + b * D * N + state, h, mask=inside)
