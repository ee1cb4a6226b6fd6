"""The delta rule where the channels of a head share their decay, or where nothing decays.

Inside a chunk, with S the state before it, a(t, s) = exp(g_{s+1} + ... + g_t) and a(t) the decay since its start,

    w_t = v_t - a(t) k_t^T S - sum_{s<t} N_ts w_s,   N_ts = a(t, s) beta_s k_t.k_s
    o_t =       a(t) q_t^T S + sum_{s<=t} P_ts w_s,  P_ts = a(t, s) beta_s q_t.k_s

Neither P nor X = (I + N)^-1 depends on the state. `prepare_kernel` makes them for all chunks at once; the others walk
the chunks with the state in registers. The gradient of r = X^-1 w is dr = X^T dw, and dv = dr; those of N and P follow
from outer products of dr and do with w.

The walk back keeps everything in which a step of dr or a row of dS would be transposed as its transpose from the start:
Triton 3.4 to 3.7 miscompiles some products of transposed accumulators on Hopper.

dg_u sums a slope over all pairs of a write and a later read on either side of u. Those of a chunk are summed directly;
what enters or leaves the chunk passes through S or dS. So no small number is a difference of large ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.delta_rule.triangles import (
    decay_between,
    inverse,
    load_decay,
    load_square,
    load_steps,
    store_transposed,
)
from zoo.kernels.tiles import load_rows, store_rows


@triton.jit
def prepare_kernel(
    q, k, beta, g, squares, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, HALVINGS: tl.constexpr,
    DECAYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """squares (B, H, chunks, 2, C, C) = X, P; one program per chunk."""
    chunks = tl.cdiv(T, C)
    at = tl.cast(tl.program_id(0) % chunks * C, tl.int64)
    head = tl.cast(tl.program_id(0) // chunks, tl.int64)
    b, h = head // H, head % H
    row = tl.arange(0, C)
    live = at + row < T
    i = tl.arange(0, BLOCK_K)
    b_q = load_rows(q + b * q_b + h * q_h + at * q_t, row, q_t, live, i, K, BLOCK_K)
    b_k = load_rows(k + b * k_b + h * k_h + at * k_t, row, k_t, live, i, K, BLOCK_K)
    b_beta = load_steps(beta + b * beta_b + h * beta_h, at, row, beta_t, T)
    n = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_beta[:, None]
    p = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_beta[:, None]
    if DECAYS:
        a = decay_between(load_decay(g + b * g_b + h * g_h, at, row, g_t, T), C, PRECISION)
        n *= a
        p *= a
    squares += tl.cast(tl.program_id(0), tl.int64) * 2 * C * C
    n = tl.where(row[:, None] < row[None, :], n, 0.0)
    store_transposed(squares, inverse(n, C, HALVINGS, PRECISION), C)
    store_transposed(squares + C * C, tl.where(row[:, None] <= row[None, :], p, 0.0), C)


@triton.jit
def forward_kernel(
    q, k, v, beta, g, first, squares, o, w, last, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    DECAYS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and w; one program per sequence, head and BLOCK columns of v."""
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    column = tl.program_id(0) % blocks * BLOCK
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    beta += b * beta_b + h * beta_h
    g += b * g_b + h * g_h
    o += (b * T * H + h) * V
    w += (b * T * H + h) * V
    dtype = q.dtype.element_ty
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = column + tl.arange(0, BLOCK)
    inside = (i < K)[:, None] & (j < V)[None, :]
    state = head * K * V + i[:, None] * V + j[None, :]
    if HAS_FIRST:
        S = tl.load(first + state, mask=inside, other=0.0)
    else:
        S = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    chunks = tl.cdiv(T, C)
    squares += head * chunks * 2 * C * C
    for chunk in range(chunks):
        at = tl.cast(chunk, tl.int64) * C
        live = at + row < T
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK)
        b_X = load_square(squares + at * 2 * C, C)
        b_P = load_square(squares + at * 2 * C + C * C, C)
        b_beta = load_steps(beta, at, row, beta_t, T)
        held = tl.dot(b_k, S.to(dtype), input_precision=PRECISION)
        past = tl.dot(b_q, S.to(dtype), input_precision=PRECISION)
        if DECAYS:
            since = tl.exp2(tl.cumsum(load_decay(g, at, row, g_t, T), 0))
            held *= since[:, None]
            past *= since[:, None]
        b_w = tl.dot(b_X, (b_v - held).to(dtype), input_precision=PRECISION)
        b_o = tl.dot(b_P, b_w.to(dtype), past, input_precision=PRECISION)
        store_rows(w + at * H * V, b_w, row, H * V, live, j, V, BLOCK)
        store_rows(o + at * H * V, b_o, row, H * V, live, j, V, BLOCK)
        if DECAYS:
            b_g = load_decay(g, at, row + 1, g_t, tl.minimum(T, at + C))
            b_beta *= tl.exp2(tl.cumsum(b_g, 0, reverse=True))
            S *= tl.exp2(tl.sum(load_decay(g, at, row, g_t, T), 0))
        S = tl.dot(tl.trans(b_k), (b_w * b_beta[:, None]).to(dtype), S, input_precision=PRECISION)
    if HAS_LAST:
        tl.store(last + state, S, mask=inside)


@triton.jit
def backward_kernel(
    q, k, beta, g, first, w, squares, do, dlast, states, dq, dk, dv, dbeta, dg, dfirst, T, H, rows,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    DECAYS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every gradient, from BLOCK columns of v: dv's own; of dq, dk, dbeta and dg a part (blocks, B, T, H, ...).

    states (B, H, blocks, chunks, BLOCK, BLOCK_K), the transposed states before the chunks, is written by the walk
    forward and read by the walk back. rows is B * T * H.
    """
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % blocks
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    tokens = b * T * H + h
    part = tl.cast(block, tl.int64) * rows + tokens
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    beta += b * beta_b + h * beta_h
    g += b * g_b + h * g_h
    do += b * do_b + h * do_h
    w += tokens * V
    dv += tokens * V
    dq += part * K
    dk += part * K
    dbeta += part
    dg += part
    dtype = q.dtype.element_ty
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = block * BLOCK + tl.arange(0, BLOCK)
    inside = (j < V)[:, None] & (i < K)[None, :]
    state = head * K * V + i[None, :] * V + j[:, None]
    tile = tl.arange(0, BLOCK)[:, None] * BLOCK_K + i[None, :]
    chunks = tl.cdiv(T, C)
    squares += head * chunks * 2 * C * C
    states += tl.cast(tl.program_id(0), tl.int64) * chunks * BLOCK * BLOCK_K

    if HAS_FIRST:
        S = tl.load(first + state, mask=inside, other=0.0)
    else:
        S = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for chunk in range(chunks):
        at = tl.cast(chunk, tl.int64) * C
        live = at + row < T
        tl.store(states + tl.cast(chunk, tl.int64) * BLOCK * BLOCK_K + tile, S.to(dtype))
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_w = load_rows(w + at * H * V, row, H * V, live, j, V, BLOCK)
        b_beta = load_steps(beta, at, row, beta_t, T)
        if DECAYS:
            b_g = load_decay(g, at, row + 1, g_t, tl.minimum(T, at + C))
            b_beta *= tl.exp2(tl.cumsum(b_g, 0, reverse=True))
            S *= tl.exp2(tl.sum(load_decay(g, at, row, g_t, T), 0))
        S = tl.dot(tl.trans(b_w), (b_k * b_beta[:, None]).to(dtype), S, input_precision=PRECISION)
    # The states are read by other threads than wrote them.
    tl.debug_barrier()

    if HAS_LAST:
        dS = tl.load(dlast + state, mask=inside, other=0.0)
    else:
        dS = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        at = tl.cast(chunk, tl.int64) * C
        live = at + row < T
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_w = load_rows(w + at * H * V, row, H * V, live, j, V, BLOCK)
        b_do = load_rows(do + at * do_t, row, do_t, live, j, V, BLOCK)
        b_X = load_square(squares + at * 2 * C, C)
        b_P = load_square(squares + at * 2 * C + C * C, C)
        b_S = tl.load(states + tl.cast(chunk, tl.int64) * BLOCK * BLOCK_K + tile)
        b_beta = load_steps(beta, at, row, beta_t, T)
        # Transposed: columns are steps.
        dw = tl.dot(dS.to(dtype), tl.trans(b_k), input_precision=PRECISION)
        if DECAYS:
            b_g = load_decay(g, at, row, g_t, T)
            since = tl.exp2(tl.cumsum(b_g, 0))
            until = tl.exp2(tl.cumsum(load_decay(g, at, row + 1, g_t, tl.minimum(T, at + C)), 0, reverse=True))
            whole = tl.exp2(tl.sum(b_g, 0))
            dw *= (b_beta * until)[None, :]
        else:
            dw *= b_beta[None, :]
        dw = tl.dot(tl.trans(b_do), b_P, dw, input_precision=PRECISION)
        dr = tl.dot(dw.to(dtype), b_X, input_precision=PRECISION).to(dtype)
        tl.store(
            dv + at * H * V + row[None, :] * (H * V) + j[:, None],
            dr.to(dv.dtype.element_ty), mask=live[None, :] & (j < V)[:, None],
        )  # fmt: skip

        # Row s, column t: what the scores k_s.q_t and k_s.k_t owe to beta_s w_s.
        dP = tl.where(row[:, None] <= row[None, :], tl.dot(b_w, tl.trans(b_do), input_precision=PRECISION), 0.0)
        dN = tl.where(row[:, None] < row[None, :], -tl.dot(b_w, dr, input_precision=PRECISION), 0.0)
        if DECAYS:
            a = decay_between(b_g, C, PRECISION)
            dP *= a
            dN *= a
        write = tl.dot(b_w, dS.to(dtype), input_precision=PRECISION)
        read_q = tl.dot(b_do, b_S, input_precision=PRECISION)
        read_k = -tl.dot(tl.trans(b_S), dr, input_precision=PRECISION)
        if DECAYS:
            write *= until[:, None]
            read_q *= since[:, None]
            read_k *= since[None, :]
            kq = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            kk = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
            slopes = (dP * kq + dN * kk) * b_beta[:, None]
            reads = tl.sum(read_q * b_q, 1) + tl.sum(tl.trans(read_k) * b_k, 1)
            writes = tl.sum(write * b_k, 1) * b_beta
            crossing = tl.dot((row[:, None] > row[None, :]).to(tl.float32), slopes, input_precision=PRECISION)
            # The rows are now the steps crossed: pairs of the chunk, what it reads, and what it writes.
            crossing += tl.where(row[:, None] <= row[None, :], reads[None, :], 0.0)
            b_dg = tl.sum(tl.where(row[:, None] <= row[None, :], crossing, writes[None, :]), 1)
            b_dg += whole * tl.sum(dS * b_S)
            tl.store(dg + (at + row) * H, b_dg, mask=live)
        b_dk = write
        b_dk = tl.dot(dP.to(dtype), b_q, b_dk, input_precision=PRECISION)
        b_dk = tl.dot(dN.to(dtype), b_k, b_dk, input_precision=PRECISION)
        tl.store(dbeta + (at + row) * H, tl.sum(b_dk * b_k, 1).to(dbeta.dtype.element_ty), mask=live)
        dP = (dP * b_beta[:, None]).to(dtype)
        dN = (dN * b_beta[:, None]).to(dtype)
        read_k = tl.dot(tl.trans(b_k), dN, read_k, input_precision=PRECISION)
        store_rows(dk + at * H * K, b_dk * b_beta[:, None] + tl.trans(read_k), row, H * K, live, i, K, BLOCK_K)
        b_dq = tl.trans(tl.dot(tl.trans(b_k), dP, input_precision=PRECISION))
        store_rows(dq + at * H * K, b_dq + read_q, row, H * K, live, i, K, BLOCK_K)

        if DECAYS:
            dS *= whole
            b_q = (b_q * since[:, None]).to(dtype)
            b_k = (b_k * since[:, None]).to(dtype)
        dS = tl.dot(tl.trans(b_do), b_q, dS, input_precision=PRECISION)
        dS -= tl.dot(dr, b_k, input_precision=PRECISION)
    if HAS_FIRST:
        tl.store(dfirst + state, dS, mask=inside)
