"""The delta rule where the channels of a head share their decay, or where nothing decays.

Inside a chunk, with S the state before it, a(t, s) = exp(g_{s+1} + ... + g_t), a(t) the decay since its start and C its
last step,

    w_t = v_t - a(t) k_t^T S - sum_{s<t} N_ts w_s,   N_ts = a(t, s) beta_s k_t.k_s,    or  w = X (v - a k S)
    o_t =       a(t) q_t^T S + sum_{s<=t} P_ts w_s,  P_ts = a(t, s) beta_s q_t.k_s
    S'  =       a(C) S       + sum_s a(C, s) beta_s k_s w_s^T

with X = (I + N)^-1. UNIT: k is k' / |k'| and q is q' / (sqrt(K) |q'|) for the k' and q' that are given; the walks take
these and the factors. `prepare_kernel` makes what no state enters, for all chunks at once; `walk_kernels` has the walks
through the chunks, and `gradient_kernel` takes all chunks at once again. The gradients of N and P are outer products of
-dr and do with w, where dr = dv.

dg_u sums a slope over all pairs of a write and a later read on either side of u: those of a chunk, and what enters or
leaves the chunk through S or dS. None crosses no decay at all, so no small number is a difference of large ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.delta_rule.triangles import decay_between, decay_until, inverse, load_decay, load_steps, store_square
from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import load_rows, store_rows


@triton.jit
def normalized(x, length, eps):
    """Rows of x made `length` long, and by what factors."""
    wide = x.to(tl.float32)
    factor = length * tl.rsqrt(tl.sum(wide * wide, 1) + eps)
    return (wide * factor[:, None]).to(x.dtype), factor


@kernel
def prepare_kernel(
    q, k, v, beta, g, W, U, squares, reads, writes, totals, T, H, eps,
    q_n, q_t, q_h, k_n, k_t, k_h, v_n, v_t, v_h, beta_n, beta_t, beta_h, g_n, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    HALVINGS: tl.constexpr, DECAYS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W = -X a k (B, H, T, K), U = X v (B, H, T, V), squares X, P (B, H, chunks, 2, C, C); reads a(t) and writes
    a(C, s) beta_s (B, H, T), UNIT with the factors of q' and k'; totals (B, H, chunks), log2 of a(C). One program per
    chunk."""
    wait_for_earlier()
    dtype = q.dtype.element_ty
    chunks = tl.cdiv(T, C)
    head = tl.cast(tl.program_id(0) // chunks, tl.int64)
    at = tl.cast(tl.program_id(0) % chunks * C, tl.int64)
    n, h = head // H, head % H
    row = tl.arange(0, C)
    live = at + row < T
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    b_q = load_rows(q + n * q_n + h * q_h + at * q_t, row, q_t, live, i, K, BLOCK_K)
    b_k = load_rows(k + n * k_n + h * k_h + at * k_t, row, k_t, live, i, K, BLOCK_K)
    b_v = load_rows(v + n * v_n + h * v_h + at * v_t, row, v_t, live, j, V, BLOCK_V)
    b_beta = load_steps(beta + n * beta_n + h * beta_h, at, row, beta_t, T)
    if UNIT:
        b_q, read = normalized(b_q, K**-0.5, eps)
        b_k, write = normalized(b_k, 1.0, eps)
        write *= b_beta
    else:
        read = tl.full((C,), 1.0, tl.float32)
        write = b_beta
    N = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_beta[None, :]
    P = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_beta[None, :]
    if DECAYS:
        g += n * g_n + h * g_h
        b_g = load_decay(g, at, row, g_t, T)
        b_since = tl.cumsum(b_g, 0)
        total = tl.sum(b_g, 0)
        a = decay_between(b_g, b_since, C, dtype)
        N *= a
        P *= a
        write *= tl.exp2(decay_until(g, b_since, total, at, row, g_t, T, C, dtype))
        read *= tl.exp2(b_since)
        b_k = (b_k * tl.exp2(b_since)[:, None]).to(dtype)
        tl.store(totals + tl.program_id(0), total)
    if DECAYS or UNIT:
        tl.store(reads + head * T + at + row, read, mask=live)
    tl.store(writes + head * T + at + row, write, mask=live)
    X = inverse(tl.where(row[:, None] > row[None, :], N, 0.0), C, HALVINGS, PRECISION).to(dtype)
    squares += tl.cast(tl.program_id(0), tl.int64) * (2 * C * C)
    store_square(squares, X, C)
    store_square(squares + C * C, tl.where(row[:, None] >= row[None, :], P, 0.0), C)
    b_W = -tl.dot(X, b_k, input_precision=PRECISION)
    b_U = tl.dot(X, b_v, input_precision=PRECISION)
    store_rows(W + (head * T + at) * K, b_W, row, K, live, i, K, BLOCK_K)
    store_rows(U + (head * T + at) * V, b_U, row, V, live, j, V, BLOCK_V)


@kernel
def gradient_kernel(
    q, k, beta, g, w, states, dstates, do, dr, dq, dk, dbeta, dg, T, H, eps,
    q_n, q_t, q_h, k_n, k_t, k_h, beta_n, beta_t, beta_h, g_n, g_t, g_h, do_n, do_t, do_h, dr_n, dr_t, dr_h,
    dq_n, dq_t, dq_h, dk_n, dk_t, dk_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_V: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, DECAYS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dbeta and dg, from what the walks left; one program per chunk."""
    wait_for_earlier()
    dtype = q.dtype.element_ty
    chunks = tl.cdiv(T, C)
    head = tl.cast(tl.program_id(0) // chunks, tl.int64)
    at = tl.cast(tl.program_id(0) % chunks * C, tl.int64)
    n, h = head // H, head % H
    row = tl.arange(0, C)
    live = at + row < T
    i = tl.arange(0, BLOCK_K)
    tokens = (n * T + at) * H + h
    w += (head * T + at) * V
    do += n * do_n + h * do_h + at * do_t
    dr += n * dr_n + h * dr_h + at * dr_t
    dq += n * dq_n + h * dq_h + at * dq_t
    dk += n * dk_n + h * dk_h + at * dk_t
    chunk = tl.cast(tl.program_id(0), tl.int64)
    states += chunk * (PADDED_V * BLOCK_K)
    dstates += chunk * (PADDED_V * BLOCK_K)

    b_beta = load_steps(beta + n * beta_n + h * beta_h, at, row, beta_t, T)
    b_k = load_rows(k + n * k_n + h * k_h + at * k_t, row, k_t, live, i, K, BLOCK_K)
    b_q = load_rows(q + n * q_n + h * q_h + at * q_t, row, q_t, live, i, K, BLOCK_K)
    if UNIT:
        b_q, q_factor = normalized(b_q, K**-0.5, eps)
        b_k, k_factor = normalized(b_k, 1.0, eps)
    if DECAYS:
        g += n * g_n + h * g_h
        b_g = load_decay(g, at, row, g_t, T)
        b_since = tl.cumsum(b_g, 0)
        total = tl.sum(b_g, 0)
    # Row t, column s.
    dP = tl.zeros((C, C), tl.float32)
    dN = tl.zeros((C, C), tl.float32)
    b_dq = tl.zeros((C, BLOCK_K), tl.float32)
    read = tl.zeros((C, BLOCK_K), tl.float32)
    leave = tl.zeros((C, BLOCK_K), tl.float32)
    across = tl.zeros((BLOCK_K,), tl.float32)
    for column in range(0, V, BLOCK):
        j = column + tl.arange(0, BLOCK)
        b_do = load_rows(do, row, do_t, live, j, V, BLOCK)
        b_dr = load_rows(dr, row, dr_t, live, j, V, BLOCK)
        b_w = load_rows(w, row, V, live, j, V, BLOCK)
        b_S = tl.load(states + j[:, None] * BLOCK_K + i[None, :])
        b_dS = tl.load(dstates + j[:, None] * BLOCK_K + i[None, :])
        dP = tl.dot(b_do, tl.trans(b_w), dP, input_precision=PRECISION)
        dN = tl.dot(b_dr, tl.trans(b_w), dN, input_precision=PRECISION)
        b_dq = tl.dot(b_do, b_S, b_dq, input_precision=PRECISION)
        read = tl.dot(b_dr, b_S, read, input_precision=PRECISION)
        leave = tl.dot(b_w, b_dS, leave, input_precision=PRECISION)
        if DECAYS:
            across += tl.sum(b_S.to(tl.float32) * b_dS, 0)
    written = (b_k * b_beta[:, None]).to(dtype)
    later = row[:, None] > row[None, :]
    if DECAYS:
        # Where it matters which decays a pair crosses, that of a step with itself, which crosses none, is kept apart.
        now = tl.sum(tl.where(row[:, None] == row[None, :], dP, 0.0), 1)
        a = decay_between(b_g, b_since, C, dtype)
        dP = tl.where(later, dP * a, 0.0).to(dtype)
        dN *= a
        decayed = tl.exp2(b_since)[:, None]
        b_dq *= decayed
        read *= decayed
        leave *= tl.exp2(decay_until(g, b_since, total, at, row, g_t, T, C, dtype))[:, None]
    else:
        dP = tl.where(row[:, None] >= row[None, :], dP, 0.0).to(dtype)
    dN = tl.where(later, dN, 0.0).to(dtype)
    b_dq = tl.dot(dP, written, b_dq, input_precision=PRECISION)
    if DECAYS:
        slopes = b_dq * b_q
        b_dq += now[:, None] * written
    if UNIT:
        b_dq = q_factor[:, None] * (b_dq - b_q * (K * tl.sum(b_dq * b_q, 1))[:, None])
    store_rows(dq, b_dq, row, dq_t, live, i, K, BLOCK_K)

    write = tl.dot(tl.trans(dP), b_q, input_precision=PRECISION)
    write = tl.dot(tl.trans(-dN), b_k, write, input_precision=PRECISION)
    read = tl.dot(dN, written, read, input_precision=PRECISION)
    if DECAYS:
        # What a step reads crosses the decays up to its own, but in a pair of the chunk none before the write: there
        # the same products are taken off again. What it leaves to later chunks crosses the decays behind it.
        slopes = tl.sum(slopes - read * b_k - write * written, 1)
        leaves = tl.sum(leave * b_k, 1) * b_beta
        b_dg = tl.sum(tl.where(row[:, None] <= row[None, :], slopes[None, :], leaves[None, :]), 1)
        b_dg += tl.exp2(total) * tl.sum(across, 0)
        tl.store(dg + tokens + row * H, b_dg.to(dg.dtype.element_ty), mask=live)
        leave += now[:, None] * b_q
    write += leave
    tl.store(dbeta + tokens + row * H, tl.sum(write * b_k, 1).to(dbeta.dtype.element_ty), mask=live)
    b_dk = write * b_beta[:, None] - read
    if UNIT:
        b_dk = k_factor[:, None] * (b_dk - b_k * tl.sum(b_dk * b_k, 1)[:, None])
    store_rows(dk, b_dk, row, dk_t, live, i, K, BLOCK_K)
