"""Taylor attention without a state: every query against every key before it, as flash attention does, less the softmax.

With u_ts = 1 + scale q_t.k_s the weights are p = 1 + s + s^2/2 = (u^2 + 1) / 2; the half is left to the normaliser,
1 / n_t = sum_{s<=t} (u_ts^2 + 1) + 2 eps. With dp_ts = do_t.v_s and m_t = do_t.o_t the gradients are

    ds_ts = 2 u_ts (dp_ts - m_t) n_t        dv_s = sum_{t>=s} (u_ts^2 + 1) n_t do_t
    dq_t = scale sum_{s<=t} ds_ts k_s       dk_s = scale sum_{t>=s} ds_ts q_t

The gradients of the first tokens are by far the largest: they have few keys to share a gradient with. Rounding to 16
bits is taken out of their way. On the diagonal, which has all their pairs, ds and p are split into two 16-bit numbers,
and the first block has m_t from sums over its pairs instead of from o_t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import load_rows, product_in_two, store_rows


@triton.jit
def attend(
    b_q, k, k_t, v, v_t, first, T, scale, norm, total,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """norm and total with the C keys from `first` on."""
    row = tl.arange(0, C)
    at = tl.cast(first, tl.int64)
    b_k = load_rows(k + at * k_t, row, k_t, first + row < T, tl.arange(0, BLOCK_K), K, BLOCK_K)
    b_v = load_rows(v + at * v_t, row, v_t, first + row < T, tl.arange(0, BLOCK_V), V, BLOCK_V)
    u = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + 1.0
    p = u * u + 1.0
    if DIAGONAL:
        p = tl.where(row[:, None] >= row[None, :], p, 0.0)
        total = product_in_two(p, b_v, total, PRECISION)
    else:
        total = tl.dot(p.to(b_v.dtype), b_v, total, input_precision=PRECISION)
    return norm + tl.sum(p, 1), total


@kernel
def forward_kernel(
    q, k, v, o, n, T, H, scale, eps, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and C queries, the last ones first: they have the most keys."""
    wait_for_earlier()
    blocks = tl.cdiv(T, C)
    mine = (blocks - 1 - tl.program_id(0) % blocks) * C
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    row = tl.arange(0, C)
    at = tl.cast(mine, tl.int64)
    live = mine + row < T
    b_q = load_rows(q + b * q_b + h * q_h + at * q_t, row, q_t, live, tl.arange(0, BLOCK_K), K, BLOCK_K)
    total = tl.zeros((C, BLOCK_V), tl.float32)
    norm = tl.zeros((C,), tl.float32)
    for first in range(0, mine, C):
        norm, total = attend(
            b_q, k, k_t, v, v_t, first, T, scale, norm, total, K, V, BLOCK_K, BLOCK_V, C, False, PRECISION
        )
    norm, total = attend(b_q, k, k_t, v, v_t, mine, T, scale, norm, total, K, V, BLOCK_K, BLOCK_V, C, True, PRECISION)
    over_norm = 1.0 / (norm + 2.0 * eps)
    tl.store(n + (b * T + at + row) * H + h, over_norm, mask=live)
    j = tl.arange(0, BLOCK_V)
    store_rows(o + ((b * T + at) * H + h) * V, total * over_norm[:, None], row, H * V, live, j, V, BLOCK_V)


@kernel
def query_kernel(
    q, k, v, o, n, do, m, dq, T, H, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and m for `key_kernel`: one program per sequence, head and C queries."""
    wait_for_earlier()
    blocks = tl.cdiv(T, C)
    mine = (blocks - 1 - tl.program_id(0) % blocks) * C
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    at = tl.cast(mine, tl.int64)
    live = mine + row < T
    tokens = (b * T + at) * H + h
    b_q = load_rows(q + b * q_b + h * q_h + at * q_t, row, q_t, live, i, K, BLOCK_K)
    b_do = load_rows(do + b * do_b + h * do_h + at * do_t, row, do_t, live, j, V, BLOCK_V)
    b_o = load_rows(o + tokens * V, row, H * V, live, j, V, BLOCK_V)
    over_norm = tl.load(n + tokens + row * H, mask=live, other=0.0)
    mean = tl.sum(b_do.to(tl.float32) * b_o, 1)
    b_dq = tl.zeros((C, BLOCK_K), tl.float32)
    for first in range(0, mine, C):
        source = tl.cast(first, tl.int64)
        b_k = load_rows(k + source * k_t, row, k_t, first + row < T, i, K, BLOCK_K)
        b_v = load_rows(v + source * v_t, row, v_t, first + row < T, j, V, BLOCK_V)
        u = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + 1.0
        dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_dq = tl.dot((u * (dp - mean[:, None])).to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
    b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK_V)
    u = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + 1.0
    dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    causal = row[:, None] >= row[None, :]
    if mine == 0:
        mean = tl.sum(tl.where(causal, (u * u + 1.0) * dp, 0.0), 1) * over_norm
    tl.store(m + tokens + row * H, mean, mask=live)
    b_dq = product_in_two(tl.where(causal, u * (dp - mean[:, None]), 0.0), b_k, b_dq, PRECISION)
    store_rows(dq + tokens * K, b_dq * (2.0 * scale * over_norm)[:, None], row, H * K, live, i, K, BLOCK_K)


@triton.jit
def differentiate_key(
    b_k, b_v, q, q_t, do, do_t, n, m, n_t, first, T, scale, b_dk, b_dv,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk / 2 scale and dv with the C queries from `first` on; those past the end have n = 0."""
    row = tl.arange(0, C)
    at = tl.cast(first, tl.int64)
    live = first + row < T
    b_q = load_rows(q + at * q_t, row, q_t, live, tl.arange(0, BLOCK_K), K, BLOCK_K)
    b_do = load_rows(do + at * do_t, row, do_t, live, tl.arange(0, BLOCK_V), V, BLOCK_V)
    over_norm = tl.load(n + (at + row) * n_t, mask=live, other=0.0)
    mean = tl.load(m + (at + row) * n_t, mask=live, other=0.0)
    u = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale + 1.0
    p = (u * u + 1.0) * over_norm[None, :]
    ds = u * over_norm[None, :] * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - mean[None, :])
    if DIAGONAL:
        causal = row[:, None] <= row[None, :]
        b_dk = product_in_two(tl.where(causal, ds, 0.0), b_q, b_dk, PRECISION)
        b_dv = product_in_two(tl.where(causal, p, 0.0), b_do, b_dv, PRECISION)
    else:
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        b_dv = tl.dot(p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    return b_dk, b_dv


@kernel
def key_kernel(
    q, k, v, n, do, m, dk, dv, T, H, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv: one program per sequence, head and C keys, the first ones first: they have the most queries."""
    wait_for_earlier()
    blocks = tl.cdiv(T, C)
    mine = tl.program_id(0) % blocks * C
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    q += b * q_b + h * q_h
    do += b * do_b + h * do_h
    n += b * T * H + h
    m += b * T * H + h
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    at = tl.cast(mine, tl.int64)
    live = mine + row < T
    b_k = load_rows(k + b * k_b + h * k_h + at * k_t, row, k_t, live, i, K, BLOCK_K)
    b_v = load_rows(v + b * v_b + h * v_h + at * v_t, row, v_t, live, j, V, BLOCK_V)
    b_dk = tl.zeros((C, BLOCK_K), tl.float32)
    b_dv = tl.zeros((C, BLOCK_V), tl.float32)
    b_dk, b_dv = differentiate_key(
        b_k, b_v, q, q_t, do, do_t, n, m, H, mine, T, scale, b_dk, b_dv,
        K, V, BLOCK_K, BLOCK_V, C, True, PRECISION,
    )  # fmt: skip
    for first in range(mine + C, T, C):
        b_dk, b_dv = differentiate_key(
            b_k, b_v, q, q_t, do, do_t, n, m, H, first, T, scale, b_dk, b_dv,
            K, V, BLOCK_K, BLOCK_V, C, False, PRECISION,
        )  # fmt: skip
    tokens = (b * T + at) * H + h
    store_rows(dk + tokens * K, b_dk * (2.0 * scale), row, H * K, live, i, K, BLOCK_K)
    store_rows(dv + tokens * V, b_dv, row, H * V, live, j, V, BLOCK_V)
