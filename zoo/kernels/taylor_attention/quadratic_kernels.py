"""Taylor attention without a state: every query against every key before it. Best while T is of the order of F.

With n_t = sum_{s<=t} p_ts + eps, p = 1 + s + s^2/2 and s_ts = scale q_t.k_s, the gradients are those of attention:

    ds_ts = (1 + s_ts) (do_t.v_s - do_t.o_t) / n_t      dv_s = sum_{t>=s} p_ts do_t / n_t
    dq_t = scale sum_{s<=t} ds_ts k_s                   dk_s = scale sum_{t>=s} ds_ts q_t
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import load_rows, store_rows


@triton.jit
def forward_kernel(
    q, k, v, o, n, T, H, scale, eps, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and C queries, the last ones first: they have the most keys."""
    blocks = tl.cdiv(T, C)
    last = blocks - 1 - tl.program_id(0) % blocks
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    at = tl.cast(last * C, tl.int64)
    live = last * C + row < T
    b_q = load_rows(q + b * q_b + h * q_h + at * q_t, row, q_t, live, i, K, BLOCK_K)
    total = tl.zeros((C, BLOCK_V), tl.float32)
    norm = tl.zeros((C,), tl.float32)
    for block in range(last + 1):
        source = tl.cast(block * C, tl.int64)
        b_k = load_rows(k + source * k_t, row, k_t, block * C + row < T, i, K, BLOCK_K)
        b_v = load_rows(v + source * v_t, row, v_t, block * C + row < T, j, V, BLOCK_V)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        p = tl.where(row[:, None] + (last - block) * C >= row[None, :], s * (0.5 * s + 1.0) + 1.0, 0.0)
        norm += tl.sum(p, 1)
        total = tl.dot(p.to(b_v.dtype), b_v, total, input_precision=PRECISION)
    norm += eps
    tl.store(n + (b * T + at + row) * H + h, norm, mask=live)
    store_rows(o + ((b * T + at) * H + h) * V, total / norm[:, None], row, H * V, live, j, V, BLOCK_V)


@triton.jit
def backward_kernel(
    q, k, v, o, n, do, dq, dk, dv, T, H, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and C rows, of dq or of dk and dv."""
    blocks = tl.cdiv(T, C)
    order = tl.program_id(0) % (2 * blocks)
    head = tl.cast(tl.program_id(0) // (2 * blocks), tl.int64)
    b, h = head // H, head % H
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    do += b * do_b + h * do_h
    tokens = b * T * H + h
    o += tokens * V
    n += tokens
    dtype = q.dtype.element_ty
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    # The longest programs first: the last queries, the first keys.
    if order % 2 == 0:
        mine = blocks - 1 - order // 2
        at = tl.cast(mine * C, tl.int64)
        live = mine * C + row < T
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_do = load_rows(do + at * do_t, row, do_t, live, j, V, BLOCK_V)
        b_o = load_rows(o + at * H * V, row, H * V, live, j, V, BLOCK_V)
        over_norm = 1.0 / tl.load(n + (at + row) * H, mask=live, other=1.0)
        mean = tl.sum(b_do.to(tl.float32) * b_o, 1)
        b_dq = tl.zeros((C, BLOCK_K), tl.float32)
        for block in range(mine + 1):
            source = tl.cast(block * C, tl.int64)
            b_k = load_rows(k + source * k_t, row, k_t, block * C + row < T, i, K, BLOCK_K)
            b_v = load_rows(v + source * v_t, row, v_t, block * C + row < T, j, V, BLOCK_V)
            s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
            dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - mean[:, None]
            ds = tl.where(row[:, None] + (mine - block) * C >= row[None, :], dp * (1.0 + s), 0.0) * over_norm[:, None]
            b_dq = tl.dot(ds.to(dtype), b_k, b_dq, input_precision=PRECISION)
        store_rows(dq + (tokens + at * H) * K, b_dq * scale, row, H * K, live, i, K, BLOCK_K)
    else:
        mine = order // 2
        at = tl.cast(mine * C, tl.int64)
        live = mine * C + row < T
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK_V)
        b_dk = tl.zeros((C, BLOCK_K), tl.float32)
        b_dv = tl.zeros((C, BLOCK_V), tl.float32)
        for block in range(mine, blocks):
            source = tl.cast(block * C, tl.int64)
            reads = block * C + row < T
            b_q = load_rows(q + source * q_t, row, q_t, reads, i, K, BLOCK_K)
            b_do = load_rows(do + source * do_t, row, do_t, reads, j, V, BLOCK_V)
            b_o = load_rows(o + source * H * V, row, H * V, reads, j, V, BLOCK_V)
            over_norm = 1.0 / tl.load(n + (source + row) * H, mask=reads, other=1.0)
            mean = tl.sum(b_do.to(tl.float32) * b_o, 1)
            causal = row[:, None] <= row[None, :] + (block - mine) * C
            s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
            p = tl.where(causal, s * (0.5 * s + 1.0) + 1.0, 0.0) * over_norm[None, :]
            b_dv = tl.dot(p.to(dtype), b_do, b_dv, input_precision=PRECISION)
            dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - mean[None, :]
            ds = tl.where(causal, dp * (1.0 + s), 0.0) * over_norm[None, :]
            b_dk = tl.dot(ds.to(dtype), b_q, b_dk, input_precision=PRECISION)
        store_rows(dk + (tokens + at * H) * K, b_dk * scale, row, H * K, live, i, K, BLOCK_K)
        store_rows(dv + (tokens + at * H) * V, b_dv, row, H * V, live, j, V, BLOCK_V)
