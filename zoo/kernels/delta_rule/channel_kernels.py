"""The generalised delta rule, where every channel has its own decay.

Inside a chunk, with S the state before it, a_c(t, s) = exp(g_{s+1,c} + ... + g_{t,c}), a_c(t) the decay since its start
and C its last step, the scores of readers q after their step, a before it, and of writers y = b, k, are

    P^y_ts = sum_c q_tc a_c(t, s) y_sc, s <= t,     A^y_ts = sum_c a_tc a_c(t-1, s) y_sc, s < t

    u_t = (a(t-1) * a_t)^T S + sum_s A^b_ts u_s + A^k_ts v_s,    or  u = X r,  X = (I - A^b)^-1
    o_t = (a(t) * q_t)^T S   + sum_s P^b_ts u_s + P^k_ts v_s
    S'  = a(C) * S           + sum_s (a(C, s) * b_s) u_s^T + (a(C, s) * k_s) v_s^T

DELTA: the delta rule, where a = a(t, t-1) k, the keys are beta k and b is their negative, all made in the kernels.
`prepare_kernel` makes what no state enters, for all chunks at once; `walk_kernels` has the walks through the chunks;
`gradient_kernel` takes all chunks at once again.

Inside a chunk a(t, s) is split into a factor of t and one of s. BOUNDED: from the middle of the chunk, where the caller
knows that neither overflows. The decay to there is rounded to a power of 2: steps behind t then change exponents that
cancel, and no bit of o_t. Else no factor may be above 1: in an aligned block of 2h steps the first h reach the last h
through its middle, and h from 1 to C/2 covers every pair once. The logarithms of the factors are products of g with a
matrix of 0 and 1, and dg collects slopes through the same matrix transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.delta_rule.triangles import inverse, pairs_of_halves, store_square
from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import LOG2E, load_rows, store_rows


@triton.jit
def to_middle(h, C: tl.constexpr, BEFORE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """1 at (s, u) where the decay of step u lies between step s and the middle of its block of 2h, else 0.

    With BEFORE a step of a last half stands before its own decay.
    """
    s = tl.arange(0, C)[None, :] if TRANSPOSED else tl.arange(0, C)[:, None]
    u = tl.arange(0, C)[:, None] if TRANSPOSED else tl.arange(0, C)[None, :]
    since = u < s if BEFORE else u <= s
    return (((s ^ u) < h) & (((s & h) != 0) & since | ((s & h) == 0) & (u > s))).to(tl.float32)


@triton.jit
def load_decays(g, row, stride_t, stride_c, live, i, K: tl.constexpr):
    """Log2 decays of steps and channels. Below -1000 nothing is left anyway."""
    x = tl.load(g + row[:, None] * stride_t + i[None, :] * stride_c, mask=live[:, None] & (i < K)[None, :], other=0.0)
    return tl.maximum(x.to(tl.float32) * LOG2E, -1000.0)


@triton.jit
def load_vectors(
    q, k, a, b, beta, row, q_t, k_t, a_t, b_t, beta_t, live, i,
    K: tl.constexpr, BLOCK_K: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Of the steps of a chunk, where the pointers stand: q, the keys, a and b."""
    b_q = load_rows(q, row, q_t, live, i, K, BLOCK_K)
    b_k = load_rows(k, row, k_t, live, i, K, BLOCK_K)
    if DELTA:
        b_a = b_k
        b_beta = tl.load(beta + row * beta_t, mask=live, other=0.0).to(tl.float32)
        b_k = (b_k * b_beta[:, None]).to(b_a.dtype)
        b_b = -b_k
    else:
        b_a = load_rows(a, row, a_t, live, i, K, BLOCK_K)
        b_b = load_rows(b, row, b_t, live, i, K, BLOCK_K)
    return b_q, b_k, b_a, b_b


@triton.jit
def sums(g, C: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr):
    """Of the logarithms g (C, K): from the start of the chunk to each step, with its own for q, and for a; and from
    each step to the end. Every one is a sum, not a difference of longer ones."""
    row = tl.arange(0, C)
    since = tl.dot((row[None, :] <= row[:, None]).to(tl.float32), g, input_precision=PRECISION)
    if DELTA:
        before = since
    else:
        before = tl.dot((row[None, :] < row[:, None]).to(tl.float32), g, input_precision=PRECISION)
    until = tl.dot((row[None, :] > row[:, None]).to(tl.float32), g, input_precision=PRECISION)
    return since, before, until


@kernel
def prepare_kernel(
    q, k, v, a, b, beta, g, decayed, since, W, U, squares, totals, T, H,
    q_n, q_t, q_h, k_n, k_t, k_h, v_n, v_t, v_h, a_n, a_t, a_h, b_n, b_t, b_h, beta_n, beta_t, beta_h,
    g_n, g_t, g_h, g_c,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    HALVINGS: tl.constexpr, BOUNDED: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """decayed (B, H, 3, T, K): q from, and b, k to the border of their chunk; W = X (a from the border) (B, H, T, K),
    U = X A^k v (B, H, T, V); squares X, P^b, A^k, P^k (B, H, chunks, 4, C, C); totals (B, H, chunks, K): the decay
    across a chunk. BOUNDED: decayed (B, H, 4, T, K) and W are q, b, k, a and X a from and to the middle of the chunk,
    since (B, H, T, K) log2 of the decay from there, totals (B, H, chunks, 2, K) to and from there. One program per
    chunk."""
    wait_for_earlier()
    dtype = q.dtype.element_ty
    chunks = tl.cdiv(T, C)
    chunk = tl.cast(tl.program_id(0), tl.int64)
    head = chunk // chunks
    n, h = head // H, head % H
    at = chunk % chunks * C
    row = tl.arange(0, C)
    live = at + row < T
    q += n * q_n + h * q_h + at * q_t
    k += n * k_n + h * k_h + at * k_t
    a += n * a_n + h * a_h + at * a_t
    b += n * b_n + h * b_h + at * b_t
    beta += n * beta_n + h * beta_h + at * beta_t
    g += n * g_n + h * g_h + at * g_t
    size = tl.cast(T, tl.int64) * K
    decayed += head * (4 if BOUNDED else 3) * size + at * K
    since += (head * T + at) * K
    W += (head * T + at) * K
    totals += chunk * (2 * K if BOUNDED else K)
    diagonal = row[:, None] == row[None, :]
    Ab = tl.zeros((C, C), tl.float32)
    Ak = tl.zeros((C, C), tl.float32)
    Pb = tl.zeros((C, C), tl.float32)
    Pk = tl.zeros((C, C), tl.float32)
    far_a = tl.zeros((C, BLOCK_K), dtype)
    for column in range(0, K, BLOCK_K):
        i = column + tl.arange(0, BLOCK_K)
        b_q, b_k, b_a, b_b = load_vectors(q, k, a, b, beta, row, q_t, k_t, a_t, b_t, beta_t, live, i, K, BLOCK_K, DELTA)
        b_g = load_decays(g, row, g_t, g_c, live, i, K)
        if BOUNDED:
            b_since = tl.cumsum(b_g, 0)
            middle = tl.floor(tl.sum(tl.where((row < C // 2)[:, None], b_g, 0.0), 0))
            tl.store(totals + i, tl.exp2(middle), mask=i < K)
            tl.store(totals + K + i, tl.exp2(tl.sum(b_g, 0) - middle), mask=i < K)
            middle = middle[None, :]
            store_rows(since, b_since - middle, row, K, live, i, K, BLOCK_K)
            near = tl.exp2(-b_since) * tl.exp2(middle)
            far_q = (b_q * (tl.exp2(b_since) * tl.exp2(-middle))).to(dtype)
            far_a = (b_a * (tl.exp2(b_since if DELTA else b_since - b_g) * tl.exp2(-middle))).to(dtype)
            b_b = (b_b * near).to(dtype)
            b_k = (b_k * near).to(dtype)
            store_rows(decayed, far_q, row, K, live, i, K, BLOCK_K)
            store_rows(decayed + size, b_b, row, K, live, i, K, BLOCK_K)
            store_rows(decayed + 2 * size, b_k, row, K, live, i, K, BLOCK_K)
            store_rows(decayed + 3 * size, far_a, row, K, live, i, K, BLOCK_K)
            near_b = tl.trans(b_b)
            near_k = tl.trans(b_k)
            Ab = tl.dot(far_a, near_b, Ab, input_precision=PRECISION)
            Ak = tl.dot(far_a, near_k, Ak, input_precision=PRECISION)
            Pb = tl.dot(far_q, near_b, Pb, input_precision=PRECISION)
            Pk = tl.dot(far_q, near_k, Pk, input_precision=PRECISION)
        else:
            b_since, before, until = sums(b_g, C, DELTA, PRECISION)
            Pb += tl.where(diagonal, tl.sum(b_q.to(tl.float32) * b_b, 1)[:, None], 0.0)
            Pk += tl.where(diagonal, tl.sum(b_q.to(tl.float32) * b_k, 1)[:, None], 0.0)
            for doubling in tl.static_range(HALVINGS):
                kept = tl.exp2(tl.dot(to_middle(1 << doubling, C, False, False), b_g, input_precision=PRECISION))
                kept_a = tl.exp2(tl.dot(to_middle(1 << doubling, C, not DELTA, False), b_g, input_precision=PRECISION))
                far_q = (b_q * kept).to(dtype)
                far_a = (b_a * kept_a).to(dtype)
                near_b = tl.trans((b_b * kept).to(dtype))
                near_k = tl.trans((b_k * kept).to(dtype))
                Ab += pairs_of_halves(tl.dot(far_a, near_b, input_precision=PRECISION), 1 << doubling, C)
                Ak += pairs_of_halves(tl.dot(far_a, near_k, input_precision=PRECISION), 1 << doubling, C)
                Pb += pairs_of_halves(tl.dot(far_q, near_b, input_precision=PRECISION), 1 << doubling, C)
                Pk += pairs_of_halves(tl.dot(far_q, near_k, input_precision=PRECISION), 1 << doubling, C)
            left = tl.exp2(until)
            store_rows(decayed, b_q * tl.exp2(b_since), row, K, live, i, K, BLOCK_K)
            store_rows(decayed + size, b_b * left, row, K, live, i, K, BLOCK_K)
            store_rows(decayed + 2 * size, b_k * left, row, K, live, i, K, BLOCK_K)
            tl.store(totals + i, tl.exp2(tl.sum(b_g, 0)), mask=i < K)
            far_a = (b_a * tl.exp2(before)).to(dtype)
        if K > BLOCK_K:
            store_rows(W, far_a, row, K, live, i, K, BLOCK_K)
    if BOUNDED:
        later = row[:, None] > row[None, :]
        Ab = tl.where(later, Ab, 0.0)
        Ak = tl.where(later, Ak, 0.0)
        Pb = tl.where(later | diagonal, Pb, 0.0)
        Pk = tl.where(later | diagonal, Pk, 0.0)
    squares += chunk * (4 * C * C)
    store_square(squares + C * C, Pb, C)
    store_square(squares + 2 * C * C, Ak, C)
    store_square(squares + 3 * C * C, Pk, C)
    X = inverse(-Ab, C, HALVINGS, PRECISION).to(dtype)
    store_square(squares, X, C)
    for column in range(0, K, BLOCK_K):
        i = column + tl.arange(0, BLOCK_K)
        if K > BLOCK_K:
            # A block has waited in W for its X; barriers, because one thread may load what another stores.
            tl.debug_barrier()
            far_a = load_rows(W, row, K, live, i, K, BLOCK_K)
            tl.debug_barrier()
        store_rows(W, tl.dot(X, far_a, input_precision=PRECISION), row, K, live, i, K, BLOCK_K)
    Ak = Ak.to(dtype)
    for column in range(0, V, BLOCK_V):
        j = column + tl.arange(0, BLOCK_V)
        b_v = load_rows(v + n * v_n + h * v_h + at * v_t, row, v_t, live, j, V, BLOCK_V)
        b_U = tl.dot(Ak, b_v, input_precision=PRECISION).to(dtype)
        b_U = tl.dot(X, b_U, input_precision=PRECISION)
        store_rows(U + (head * T + at) * V, b_U, row, V, live, j, V, BLOCK_V)


@kernel
def gradient_kernel(
    q, k, v, a, b, beta, g, decayed, since, totals, u, squares, states, dstates, do, dr,
    dq, dk, dv, da, db, dbeta, dg, T, H,
    q_n, q_t, q_h, k_n, k_t, k_h, v_n, v_t, v_h, a_n, a_t, a_h, b_n, b_t, b_h, beta_n, beta_t, beta_h,
    g_n, g_t, g_h, g_c, do_n, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_V: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, HALVINGS: tl.constexpr, BOUNDED: tl.constexpr, DELTA: tl.constexpr, DECAY_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every gradient, from what the walks left; one program per chunk. dr is (B, H, T, V)."""
    wait_for_earlier()
    dtype = q.dtype.element_ty
    chunks = tl.cdiv(T, C)
    chunk = tl.cast(tl.program_id(0), tl.int64)
    head = chunk // chunks
    n, h = head // H, head % H
    at = chunk % chunks * C
    row = tl.arange(0, C)
    live = at + row < T
    i = tl.arange(0, BLOCK_K)
    tokens = (n * T + at) * H + h
    q += n * q_n + h * q_h + at * q_t
    k += n * k_n + h * k_h + at * k_t
    a += n * a_n + h * a_h + at * a_t
    b += n * b_n + h * b_h + at * b_t
    beta += n * beta_n + h * beta_h + at * beta_t
    g += n * g_n + h * g_h + at * g_t
    u += (head * T + at) * V
    dr += (head * T + at) * V
    v += n * v_n + h * v_h + at * v_t
    do += n * do_n + h * do_h + at * do_t
    states += chunk * (PADDED_V * BLOCK_K)
    dstates += chunk * (PADDED_V * BLOCK_K)
    size = tl.cast(T, tl.int64) * K
    decayed += head * (4 if BOUNDED else 3) * size + at * K
    last_k = load_rows(decayed + 2 * size, row, K, live, i, K, BLOCK_K)
    squares += chunk * (4 * C * C) + row[None, :] * C + row[:, None]
    Ak_t = tl.load(squares + 2 * C * C)
    Pk_t = tl.load(squares + 3 * C * C)
    # Row t, column s.
    dPb = tl.zeros((C, C), tl.float32)
    dPk = tl.zeros((C, C), tl.float32)
    dAb = tl.zeros((C, C), tl.float32)
    dAk = tl.zeros((C, C), tl.float32)
    # What passes through the states before and after the chunk.
    b_dq = tl.zeros((C, BLOCK_K), tl.float32)
    b_da = tl.zeros((C, BLOCK_K), tl.float32)
    b_db = tl.zeros((C, BLOCK_K), tl.float32)
    b_dk = tl.zeros((C, BLOCK_K), tl.float32)
    across = tl.zeros((BLOCK_K,), tl.float32)
    for column in range(0, V, BLOCK):
        j = column + tl.arange(0, BLOCK)
        b_do = load_rows(do, row, do_t, live, j, V, BLOCK)
        b_dr = load_rows(dr, row, V, live, j, V, BLOCK)
        b_u = load_rows(u, row, V, live, j, V, BLOCK)
        b_v = load_rows(v, row, v_t, live, j, V, BLOCK)
        b_S = tl.load(states + j[:, None] * BLOCK_K + i[None, :])
        b_dS = tl.load(dstates + j[:, None] * BLOCK_K + i[None, :])
        b_dv = tl.dot(last_k, tl.trans(b_dS), input_precision=PRECISION)
        b_dv = tl.dot(Pk_t, b_do, b_dv, input_precision=PRECISION)
        b_dv = tl.dot(Ak_t, b_dr, b_dv, input_precision=PRECISION)
        store_rows(dv + tokens * V, b_dv, row, H * V, live, j, V, BLOCK)
        dPb = tl.dot(b_do, tl.trans(b_u), dPb, input_precision=PRECISION)
        dPk = tl.dot(b_do, tl.trans(b_v), dPk, input_precision=PRECISION)
        dAb = tl.dot(b_dr, tl.trans(b_u), dAb, input_precision=PRECISION)
        dAk = tl.dot(b_dr, tl.trans(b_v), dAk, input_precision=PRECISION)
        b_dq = tl.dot(b_do, b_S, b_dq, input_precision=PRECISION)
        b_da = tl.dot(b_dr, b_S, b_da, input_precision=PRECISION)
        b_db = tl.dot(b_u, b_dS, b_db, input_precision=PRECISION)
        b_dk = tl.dot(b_v, b_dS, b_dk, input_precision=PRECISION)
        if DECAY_GRADIENT:
            across += tl.sum(b_S.to(tl.float32) * b_dS, 0)
    later = row[:, None] > row[None, :]
    dAb = tl.where(later, dAb, 0.0).to(dtype)
    dAk = tl.where(later, dAk, 0.0).to(dtype)

    out = tokens * K
    if BOUNDED:
        until_now = row[:, None] >= row[None, :]
        dPb = tl.where(until_now, dPb, 0.0).to(dtype)
        dPk = tl.where(until_now, dPk, 0.0).to(dtype)
        far_q = load_rows(decayed, row, K, live, i, K, BLOCK_K)
        near_b = load_rows(decayed + size, row, K, live, i, K, BLOCK_K)
        far_a = load_rows(decayed + 3 * size, row, K, live, i, K, BLOCK_K)
        since += (head * T + at) * K
        b_since = load_rows(since, row, K, live, i, K, BLOCK_K)

        # A slope is what a read or a write adds to dg of the steps whose decay it sees. A pair adds it where it is read
        # and takes it away where it is written: the same numbers, so that nothing is left of it before the write.
        part = tl.dot(dPb, near_b, b_dq, input_precision=PRECISION)
        part = tl.dot(dPk, last_k, part, input_precision=PRECISION)
        slopes = part * far_q
        store_rows(dq + out, part * tl.exp2(b_since), row, H * K, live, i, K, BLOCK_K)

        part = tl.dot(dAb, near_b, b_da, input_precision=PRECISION)
        part = tl.dot(dAk, last_k, part, input_precision=PRECISION)
        by_a = part * far_a
        if DELTA:
            b_da = part * tl.exp2(b_since)
        else:
            before = load_rows(since - K, row, K, live & (row > 0), i, K, BLOCK_K)
            first_half = tl.load(totals + chunk * (2 * K) + i, mask=i < K, other=1.0)
            b_da = part * tl.where((row == 0)[:, None], 1 / first_half[None, :], tl.exp2(before))
            store_rows(da + out, b_da, row, H * K, live, i, K, BLOCK_K)

        written = b_db * near_b
        part = tl.dot(tl.trans(dPb), far_q, input_precision=PRECISION)
        part = tl.dot(tl.trans(dAb), far_a, part, input_precision=PRECISION)
        slopes -= part * near_b
        b_db = (b_db + part) * tl.exp2(-b_since)
        if not DELTA:
            store_rows(db + out, b_db, row, H * K, live, i, K, BLOCK_K)

        written += b_dk * last_k
        part = tl.dot(tl.trans(dPk), far_q, input_precision=PRECISION)
        part = tl.dot(tl.trans(dAk), far_a, part, input_precision=PRECISION)
        slopes -= part * last_k
        b_dk = (b_dk + part) * tl.exp2(-b_since)
        if DECAY_GRADIENT:
            # From a step on what is read, but not its own a; before it what is written.
            b_dg = tl.dot((row[None, :] >= row[:, None]).to(tl.float32), slopes + by_a, input_precision=PRECISION)
            b_dg = tl.dot((row[None, :] < row[:, None]).to(tl.float32), written, b_dg, input_precision=PRECISION)
            b_dg += across[None, :]
            if not DELTA:
                b_dg -= by_a
    else:
        b_q, b_k, b_a, b_b = load_vectors(q, k, a, b, beta, row, q_t, k_t, a_t, b_t, beta_t, live, i, K, BLOCK_K, DELTA)
        b_g = load_decays(g, row, g_t, g_c, live, i, K)
        b_since, before, until = sums(b_g, C, DELTA, PRECISION)
        left = tl.exp2(until)
        b_dq *= tl.exp2(b_since)
        b_da *= tl.exp2(before)
        b_db *= left
        b_dk *= left
        if DECAY_GRADIENT:
            across *= tl.exp2(tl.sum(b_g, 0))
            from_on = (row[None, :] >= row[:, None]).to(tl.float32)
            after = (row[None, :] > row[:, None]).to(tl.float32)
            past = (row[None, :] < row[:, None]).to(tl.float32)
            b_dg = tl.dot(from_on, b_q * b_dq, input_precision=PRECISION) + across[None, :]
            b_dg = tl.dot(from_on if DELTA else after, b_a * b_da, b_dg, input_precision=PRECISION)
            b_dg = tl.dot(past, b_b * b_db + b_k * b_dk, b_dg, input_precision=PRECISION)
        diagonal = row[:, None] == row[None, :]
        now_b = tl.sum(tl.where(diagonal, dPb, 0.0), 1)[:, None]
        now_k = tl.sum(tl.where(diagonal, dPk, 0.0), 1)[:, None]
        b_dq += now_b * b_b + now_k * b_k
        b_db += now_b * b_q
        b_dk += now_k * b_q
        dPb = dPb.to(dtype)
        dPk = dPk.to(dtype)
        for doubling in range(HALVINGS):
            kept = tl.exp2(tl.dot(to_middle(1 << doubling, C, False, False), b_g, input_precision=PRECISION))
            kept_a = tl.exp2(tl.dot(to_middle(1 << doubling, C, not DELTA, False), b_g, input_precision=PRECISION))
            near_b = (b_b * kept).to(dtype)
            near_k = (b_k * kept).to(dtype)
            part = tl.dot(pairs_of_halves(dPb, 1 << doubling, C), near_b, input_precision=PRECISION)
            part = tl.dot(pairs_of_halves(dPk, 1 << doubling, C), near_k, part, input_precision=PRECISION) * kept
            b_dq += part
            slopes = b_q * part
            part = tl.dot(pairs_of_halves(dAb, 1 << doubling, C), near_b, input_precision=PRECISION)
            part = tl.dot(pairs_of_halves(dAk, 1 << doubling, C), near_k, part, input_precision=PRECISION) * kept_a
            b_da += part
            if DECAY_GRADIENT:
                b_dg = tl.dot(to_middle(1 << doubling, C, not DELTA, True), b_a * part, b_dg, input_precision=PRECISION)
            far_q = (b_q * kept).to(dtype)
            far_a = (b_a * kept_a).to(dtype)
            part = tl.dot(tl.trans(pairs_of_halves(dPb, 1 << doubling, C)), far_q, input_precision=PRECISION)
            part = (
                tl.dot(tl.trans(pairs_of_halves(dAb, 1 << doubling, C)), far_a, part, input_precision=PRECISION) * kept
            )
            b_db += part
            slopes += b_b * part
            part = tl.dot(tl.trans(pairs_of_halves(dPk, 1 << doubling, C)), far_q, input_precision=PRECISION)
            part = (
                tl.dot(tl.trans(pairs_of_halves(dAk, 1 << doubling, C)), far_a, part, input_precision=PRECISION) * kept
            )
            b_dk += part
            slopes += b_k * part
            if DECAY_GRADIENT:
                b_dg = tl.dot(to_middle(1 << doubling, C, False, True), slopes, b_dg, input_precision=PRECISION)
        store_rows(dq + out, b_dq, row, H * K, live, i, K, BLOCK_K)
        if not DELTA:
            store_rows(da + out, b_da, row, H * K, live, i, K, BLOCK_K)
            store_rows(db + out, b_db, row, H * K, live, i, K, BLOCK_K)
    if DELTA:
        b_dk -= b_db
        b_k = load_rows(k, row, k_t, live, i, K, BLOCK_K)
        tl.store(dbeta + tokens + row * H, tl.sum(b_dk * b_k, 1).to(dbeta.dtype.element_ty), mask=live)
        b_beta = tl.load(beta + row * beta_t, mask=live, other=0.0).to(tl.float32)
        b_dk = b_dk * b_beta[:, None] + b_da
    store_rows(dk + out, b_dk, row, H * K, live, i, K, BLOCK_K)
    if DECAY_GRADIENT:
        store_rows(dg + out, b_dg, row, H * K, live, i, K, BLOCK_K)
