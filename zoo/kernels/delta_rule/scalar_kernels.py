"""The delta rule where the channels of a head share their decay, or where nothing decays.

Inside a chunk, with S the state before it, a(t, s) = exp(g_{s+1} + ... + g_t), a(t) the decay since its start and C its
last step,

    w_t = v_t - a(t) k_t^T S - sum_{s<t} N_ts w_s,   N_ts = a(t, s) beta_s k_t.k_s,    or  w = X (v - a k S)
    o_t =       a(t) q_t^T S + sum_{s<=t} P_ts w_s,  P_ts = a(t, s) beta_s q_t.k_s
    S'  =       a(C) S       + sum_s a(C, s) beta_s k_s w_s^T

with X = (I + N)^-1. `prepare_kernel` makes what no state enters, for all chunks at once; `walk_kernels` has the walks
through the chunks, and `gradient_kernel` takes all chunks at once again. The gradients of N and P are outer products of
-dr and do with w, where dr = dv.

dg_u sums a slope over all pairs of a write and a later read on either side of u: those of a chunk, and what enters or
leaves the chunk through S or dS. None crosses no decay at all, so no small number is a difference of large ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.delta_rule.triangles import (
    decay_between,
    decay_until,
    inverse,
    load_decay,
    load_steps,
    store_square,
)
from zoo.kernels.delta_rule.walk_kernels import inner, outer, through
from zoo.kernels.tiles import load_rows, store_rows


@triton.jit
def prepare_kernel(
    q, k, v, beta, g, W, U, squares, since, writes, totals, T, H,
    q_n, q_t, q_h, k_n, k_t, k_h, v_n, v_t, v_h, beta_n, beta_t, beta_h, g_n, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    HALVINGS: tl.constexpr, DECAYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W = -X a k (B, H, T, K), U = X v (B, H, T, V), squares X, P (B, H, chunks, 2, C, C); writes
    a(C, s) beta_s, and log2 of since a(t) (B, H, T) and of totals a(C) (B, H, chunks). One program per chunk."""
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
    N = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_beta[None, :]
    P = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_beta[None, :]
    if DECAYS:
        g += n * g_n + h * g_h
        b_g = load_decay(g, at, row, g_t, T)
        b_since = tl.cumsum(b_g, 0)
        total = tl.sum(b_g, 0)
        a = decay_between(b_g, b_since, C, dtype, False)
        N *= a
        P *= a
        b_beta *= tl.exp2(decay_until(g, b_since, total, at, row, g_t, T, C, dtype))
        b_k = (b_k * tl.exp2(b_since)[:, None]).to(dtype)
        tl.store(since + head * T + at + row, b_since, mask=live)
        tl.store(totals + tl.program_id(0), total)
    tl.store(writes + head * T + at + row, b_beta, mask=live)
    X = inverse(tl.where(row[:, None] > row[None, :], N, 0.0), C, HALVINGS, PRECISION).to(dtype)
    squares += tl.cast(tl.program_id(0), tl.int64) * (2 * C * C)
    store_square(squares, X, C)
    store_square(squares + C * C, tl.where(row[:, None] >= row[None, :], P, 0.0), C)
    b_W = -tl.dot(X, b_k, input_precision=PRECISION)
    b_U = tl.dot(X, b_v, input_precision=PRECISION)
    store_rows(W + (head * T + at) * K, b_W, row, K, live, i, K, BLOCK_K)
    store_rows(U + (head * T + at) * V, b_U, row, V, live, j, V, BLOCK_V)


@triton.jit
def gradient_kernel(
    q, k, beta, g, w, since, totals, states, dstates, do, dr, dq, dk, dbeta, dg, T, H,
    q_n, q_t, q_h, k_n, k_t, k_h, beta_n, beta_t, beta_h, g_n, g_t, g_h, do_n, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_V: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, DECAYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dbeta and dg, from what the walks left; one program per chunk."""
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
    dr += tokens * V
    chunk = tl.cast(tl.program_id(0), tl.int64)
    states += chunk * (PADDED_V * BLOCK_K)
    dstates += chunk * (PADDED_V * BLOCK_K)

    # Row t, column s, and with a _t row s, column t.
    b_beta = load_steps(beta + n * beta_n + h * beta_h, at, row, beta_t, T)
    dP = outer(do, do_t, w, V, row, live, V, BLOCK, C, PRECISION)
    dN = outer(dr, H * V, w, V, row, live, V, BLOCK, C, PRECISION)
    dP_t = outer(w, V, do, do_t, row, live, V, BLOCK, C, PRECISION)
    dN_t = -outer(w, V, dr, H * V, row, live, V, BLOCK, C, PRECISION)
    # Where it matters which decays a pair crosses, that of a step with itself, which crosses none, is kept apart.
    later = row[:, None] > row[None, :]
    earlier = row[:, None] < row[None, :]
    if DECAYS:
        now = tl.sum(tl.where(row[:, None] == row[None, :], dP_t, 0.0), 1)
        g += n * g_n + h * g_h
        b_g = load_decay(g, at, row, g_t, T)
        b_since = load_steps(since + head * T, at, row, 1, T)
        total = tl.load(totals + chunk)
        a = decay_between(b_g, b_since, C, dtype, False)
        dP = tl.where(later, dP * a, 0.0)
        dN *= a
        a = decay_between(b_g, b_since, C, dtype, True)
        dP_t = tl.where(earlier, dP_t * a, 0.0)
        dN_t *= a
    else:
        dP = tl.where(row[:, None] >= row[None, :], dP, 0.0)
        dP_t = tl.where(row[:, None] <= row[None, :], dP_t, 0.0)
    dP = dP.to(dtype)
    dN = tl.where(later, dN, 0.0).to(dtype)
    dP_t = dP_t.to(dtype)
    dN_t = tl.where(earlier, dN_t, 0.0).to(dtype)

    b_k = load_rows(k + n * k_n + h * k_h + at * k_t, row, k_t, live, i, K, BLOCK_K)
    b_q = load_rows(q + n * q_n + h * q_h + at * q_t, row, q_t, live, i, K, BLOCK_K)
    written = (b_k * b_beta[:, None]).to(dtype)
    b_dq = through(do, do_t, states, row, live, i, V, BLOCK, BLOCK_K, C, PRECISION)
    if DECAYS:
        b_dq *= tl.exp2(b_since)[:, None]
    b_dq = tl.dot(dP, written, b_dq, input_precision=PRECISION)
    if DECAYS:
        slopes = tl.sum(b_dq * b_q, 1)
        b_dq += now[:, None] * written
    store_rows(dq + tokens * K, b_dq, row, H * K, live, i, K, BLOCK_K)

    read = through(dr, H * V, states, row, live, i, V, BLOCK, BLOCK_K, C, PRECISION)
    if DECAYS:
        read *= tl.exp2(b_since)[:, None]
    read = tl.dot(dN, written, read, input_precision=PRECISION)
    write = tl.dot(dP_t, b_q, input_precision=PRECISION)
    write = tl.dot(dN_t, b_k, write, input_precision=PRECISION)
    leave = through(w, V, dstates, row, live, i, V, BLOCK, BLOCK_K, C, PRECISION)
    if DECAYS:
        leave *= tl.exp2(decay_until(g, b_since, total, at, row, g_t, T, C, dtype))[:, None]
        # What a step reads crosses the decays up to its own, but in a pair of the chunk none before the write: there
        # the same products are taken off again. What it leaves to later chunks crosses the decays behind it.
        slopes -= tl.sum(read * b_k + write * written, 1)
        leaves = tl.sum(leave * b_k, 1) * b_beta
        b_dg = tl.sum(tl.where(row[:, None] <= row[None, :], slopes[None, :], leaves[None, :]), 1)
        b_dg += tl.exp2(total) * tl.sum(inner(states, dstates, i, V, BLOCK, BLOCK_K), 0)
        tl.store(dg + tokens + row * H, b_dg.to(dg.dtype.element_ty), mask=live)
        leave += now[:, None] * b_q
    write += leave
    tl.store(dbeta + tokens + row * H, tl.sum(write * b_k, 1).to(dbeta.dtype.element_ty), mask=live)
    store_rows(dk + tokens * K, write * b_beta[:, None] - read, row, H * K, live, i, K, BLOCK_K)
