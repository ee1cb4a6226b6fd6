"""Taylor attention: every query against every key before it in its chunk, as flash attention does, less the softmax.

With u_ts = 1 + scale q_t.k_s the weights are p = 1 + s + s^2/2 = (u^2 + 1) / 2; the half is left to the normaliser,
1 / n_t = sum_{s<=t} (u_ts^2 + 1) + 2 eps. With dp_ts = do_t.v_s and m_t = do_t.o_t the gradients are

    ds_ts = 2 u_ts (dp_ts - m_t) n_t        dv_s = sum_{t>=s} (u_ts^2 + 1) n_t do_t
    dq_t = scale sum_{s<=t} ds_ts k_s       dk_s = scale sum_{t>=s} ds_ts q_t

The gradients of the first tokens are by far the largest: they have few keys to share a gradient with. Rounding to 16
bits is taken out of their way. On the diagonal, which has all their pairs, ds and p are split into two 16-bit numbers,
and the first block has m_t from sums over its pairs instead of from o_t.

What is before the chunk, and for keys the queries after it, comes as a state (HAS_STATE; `state_kernels.py`), read ROWS
channels at a time: one factor of a feature is the token's row, the other one of its numbers. Short sequences are one
chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.taylor_attention.state_kernels import at_chunk, at_head
from zoo.kernels.tiles import load_rows, product_in_two, store_rows


@triton.jit
def attend(
    b_q, mine, k, k_t, v, v_t, first, T, scale, norm, total,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, N: tl.constexpr,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """norm and total with the N keys from `first` on."""
    row, key = tl.arange(0, total.shape[0]), tl.arange(0, N)
    at = tl.cast(first, tl.int64)
    b_k = load_rows(k + at * k_t, key, k_t, first + key < T, tl.arange(0, BLOCK_K), K, BLOCK_K)
    b_v = load_rows(v + at * v_t, key, v_t, first + key < T, tl.arange(0, BLOCK_V), V, BLOCK_V)
    u = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + 1.0
    p = u * u + 1.0
    if DIAGONAL:
        p = tl.where((mine + row)[:, None] >= (first + key)[None, :], p, 0.0)
        total = product_in_two(p, b_v, total, PRECISION)
    else:
        total = tl.dot(p.to(b_v.dtype), b_v, total, input_precision=PRECISION)
    return norm + tl.sum(p, 1), total


@triton.jit
def through_state(
    x, x_t, live, b_x, b_y, S, total, dx, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    VALUES: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """VALUES: total + 2 phi(x) S, (tokens, columns). GRADIENT: dx + what is behind phi(x) S y, over scale."""
    C: tl.constexpr = b_x.shape[0]
    row, j = tl.arange(0, C), tl.arange(0, BLOCK_V)
    pointers = S + tl.arange(0, ROWS * BLOCK_K)[:, None] * V + j[None, :]
    wide = b_x.to(tl.float32)
    for first in range(0, K, ROWS):
        left = load_rows(x, row, x_t, live, first + tl.arange(0, ROWS), K, 2 * K).to(tl.float32)
        b_S = tl.load(pointers + first * BLOCK_K * V, mask=(j < V)[None, :], other=0.0)
        if VALUES:
            phi = tl.reshape((left * scale)[:, :, None] * wide[:, None, :], (C, ROWS * BLOCK_K))
            total = tl.dot(phi.to(b_x.dtype), b_S, total, input_precision=PRECISION)
        if GRADIENT:
            dphi = tl.reshape(tl.dot(b_y, tl.trans(b_S), input_precision=PRECISION), (C, ROWS, BLOCK_K))
            dx += tl.sum(left[:, :, None] * dphi, 1)
    S += BLOCK_K * BLOCK_K * V
    b_S = tl.load(S + tl.arange(0, BLOCK_K)[:, None] * V + j[None, :], mask=(j < V)[None, :], other=0.0)
    if VALUES:
        total = tl.dot((wide * (2.0 * scale)).to(b_x.dtype), b_S, total, input_precision=PRECISION)
        total += 2.0 * tl.load(S + K * V + j, mask=j < V, other=0.0).to(tl.float32)[None, :]
    if GRADIENT:
        dx = tl.dot(b_y, tl.trans(b_S), dx, input_precision=PRECISION)
    return total, dx


@triton.jit
def through_norm(b_x, z, K: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """z's second order times x, (tokens, channels); its first order; and its constant."""
    i = tl.arange(0, BLOCK_K)
    b_z = tl.load(z + i[:, None] * WIDE + i[None, :])
    high = b_z.to(b_x.dtype)
    product = tl.dot(b_x, high, input_precision=PRECISION)
    if b_x.dtype != tl.float32:
        product = tl.dot(b_x, (b_z - high.to(tl.float32)).to(b_x.dtype), product, input_precision=PRECISION)
    return product, tl.load(z + K * WIDE + i), tl.load(z + K * WIDE + K)


@triton.jit
def tokens_of(T, H, C: tl.constexpr, LAST_FIRST: tl.constexpr):
    """A program's C tokens: the first of them, the number of their sequence and head, these two, and which are live."""
    blocks = tl.cdiv(T, C)
    mine = (blocks - 1 - tl.program_id(0) % blocks if LAST_FIRST else tl.program_id(0) % blocks) * C
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    return mine, head, head // H, head % H, mine + tl.arange(0, C) < T


@kernel
def forward_kernel(
    q, k, v, o, n, S, z, T, H, L, scale, eps, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, C: tl.constexpr, N: tl.constexpr, HAS_STATE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and C queries, the last ones first: they have the most keys."""
    wait_for_earlier()
    mine, head, b, h, live = tokens_of(T, H, C, True)
    q, q_t = at_head(q, b, h, q_b, q_t, q_h, UNIT)
    k, k_t = at_head(k, b, h, k_b, k_t, k_h, UNIT)
    v, v_t = at_head(v, b, h, v_b, v_t, v_h, UNIT)
    at, row, j = tl.cast(mine, tl.int64), tl.arange(0, C), tl.arange(0, BLOCK_V)
    q += at * q_t
    b_q = load_rows(q, row, q_t, live, tl.arange(0, BLOCK_K), K, BLOCK_K)
    total = tl.zeros((C, BLOCK_V), tl.float32)
    norm = tl.zeros((C,), tl.float32)
    if HAS_STATE:
        S, z = at_chunk(S, z, head * tl.cdiv(T, L) + mine // L, V, BLOCK_K, WIDE)
        total, _ = through_state(
            q, q_t, live, b_q, total, S, total, b_q, scale, K, V, BLOCK_K, BLOCK_V, ROWS, True, False, PRECISION
        )
        second, linear, constant = through_norm(b_q, z, K, BLOCK_K, WIDE, PRECISION)
        norm += scale * tl.sum(b_q.to(tl.float32) * (second + 2.0 * linear[None, :]), 1) + 2.0 * constant
    for first in range(mine // L * L, mine, N):
        norm, total = attend(
            b_q, mine, k, k_t, v, v_t, first, T, scale, norm, total, K, V, BLOCK_K, BLOCK_V, N, False, PRECISION
        )
    for offset in tl.static_range(0, C, N):
        norm, total = attend(
            b_q, mine, k, k_t, v, v_t, mine + offset, T, scale, norm, total, K, V, BLOCK_K, BLOCK_V, N, True, PRECISION
        )
    over_norm = 1.0 / (norm + 2.0 * eps)
    tl.store(n + head * T + at + row, over_norm, mask=live)
    store_rows(o + ((b * T + at) * H + h) * V, total * over_norm[:, None], row, H * V, live, j, V, BLOCK_V)


@triton.jit
def pairs(
    b_q, b_do, k, k_t, v, v_t, first, T, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u and dp with the N keys from `first` on, and these."""
    key = tl.arange(0, N)
    at = tl.cast(first, tl.int64)
    b_k = load_rows(k + at * k_t, key, k_t, first + key < T, tl.arange(0, BLOCK_K), K, BLOCK_K)
    b_v = load_rows(v + at * v_t, key, v_t, first + key < T, tl.arange(0, BLOCK_V), V, BLOCK_V)
    u = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + 1.0
    return u, tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION), b_k


@kernel
def query_kernel(
    q, k, v, o, n, do, m, dq, S, z, T, H, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, C: tl.constexpr, N: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dq, and m for `key_kernel`: one program per sequence, head and C queries, as `forward_kernel` has them."""
    wait_for_earlier()
    mine, head, b, h, live = tokens_of(T, H, C, True)
    q, q_t = at_head(q, b, h, q_b, q_t, q_h, UNIT)
    k, k_t = at_head(k, b, h, k_b, k_t, k_h, UNIT)
    v, v_t = at_head(v, b, h, v_b, v_t, v_h, UNIT)
    do, do_t = at_head(do, b, h, do_b, do_t, do_h, UNIT)
    at, row, j = tl.cast(mine, tl.int64), tl.arange(0, C), tl.arange(0, BLOCK_V)
    q += at * q_t
    b_q = load_rows(q, row, q_t, live, tl.arange(0, BLOCK_K), K, BLOCK_K)
    tokens = (b * T + at) * H + h
    b_do = load_rows(do + at * do_t, row, do_t, live, j, V, BLOCK_V)
    b_o = load_rows(o + tokens * V, row, H * V, live, j, V, BLOCK_V)
    over_norm = tl.load(n + head * T + at + row, mask=live, other=0.0)
    mean = tl.sum(b_do.to(tl.float32) * b_o, 1)
    if mine == 0 and not HAS_FIRST:
        mean = tl.zeros((C,), tl.float32)
        for first in tl.static_range(0, C, N):
            u, dp, _ = pairs(b_q, b_do, k, k_t, v, v_t, first, T, scale, K, V, BLOCK_K, BLOCK_V, N, PRECISION)
            seen = row[:, None] >= (first + tl.arange(0, N))[None, :]
            mean += tl.sum(tl.where(seen, (u * u + 1.0) * dp, 0.0), 1)
        mean *= over_norm
    tl.store(m + head * T + at + row, mean, mask=live)
    b_dq = tl.zeros((C, BLOCK_K), tl.float32)
    if HAS_STATE:
        S, z = at_chunk(S, z, head * tl.cdiv(T, L) + mine // L, V, BLOCK_K, WIDE)
        _, b_dq = through_state(
            q, q_t, live, b_q, b_do, S, b_do, b_dq, scale, K, V, BLOCK_K, BLOCK_V, ROWS, False, True, PRECISION
        )
        second, linear, _ = through_norm(b_q, z, K, BLOCK_K, WIDE, PRECISION)
        b_dq -= mean[:, None] * (second + linear[None, :])
    for first in range(mine // L * L, mine, N):
        u, dp, b_k = pairs(b_q, b_do, k, k_t, v, v_t, first, T, scale, K, V, BLOCK_K, BLOCK_V, N, PRECISION)
        b_dq = tl.dot((u * (dp - mean[:, None])).to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    for offset in tl.static_range(0, C, N):
        u, dp, b_k = pairs(b_q, b_do, k, k_t, v, v_t, mine + offset, T, scale, K, V, BLOCK_K, BLOCK_V, N, PRECISION)
        seen = (mine + row)[:, None] >= (mine + offset + tl.arange(0, N))[None, :]
        b_dq = product_in_two(tl.where(seen, u * (dp - mean[:, None]), 0.0), b_k, b_dq, PRECISION)
    store_rows(
        dq + tokens * K, b_dq * (2.0 * scale * over_norm)[:, None], row, H * K, live, tl.arange(0, BLOCK_K), K, BLOCK_K
    )


@triton.jit
def differentiate_key(
    b_k, b_v, mine, q, q_t, do, do_t, n, m, first, T, scale, b_dk, b_dv,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, N: tl.constexpr,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk / 2 scale and dv with the N queries from `first` on; those past the end have n = 0."""
    row, query = tl.arange(0, b_dk.shape[0]), tl.arange(0, N)
    at = tl.cast(first, tl.int64)
    live = first + query < T
    b_q = load_rows(q + at * q_t, query, q_t, live, tl.arange(0, BLOCK_K), K, BLOCK_K)
    b_do = load_rows(do + at * do_t, query, do_t, live, tl.arange(0, BLOCK_V), V, BLOCK_V)
    over_norm = tl.load(n + at + query, mask=live, other=0.0)
    mean = tl.load(m + at + query, mask=live, other=0.0)
    u = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale + 1.0
    weighted = u * over_norm[None, :]
    p = u * weighted + over_norm[None, :]
    ds = weighted * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - mean[None, :])
    if DIAGONAL:
        causal = (mine + row)[:, None] <= (first + query)[None, :]
        b_dk = product_in_two(tl.where(causal, ds, 0.0), b_q, b_dk, PRECISION)
        b_dv = product_in_two(tl.where(causal, p, 0.0), b_do, b_dv, PRECISION)
    else:
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        b_dv = tl.dot(p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    return b_dk, b_dv


@kernel
def key_kernel(
    q, k, v, n, do, m, dk, dv, S, z, T, H, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, C: tl.constexpr, N: tl.constexpr, HAS_STATE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """dk and dv: one program per sequence, head and C keys, the first ones first: they have the most queries."""
    wait_for_earlier()
    mine, head, b, h, live = tokens_of(T, H, C, False)
    q, q_t = at_head(q, b, h, q_b, q_t, q_h, UNIT)
    k, k_t = at_head(k, b, h, k_b, k_t, k_h, UNIT)
    v, v_t = at_head(v, b, h, v_b, v_t, v_h, UNIT)
    do, do_t = at_head(do, b, h, do_b, do_t, do_h, UNIT)
    n += head * T
    m += head * T
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    at = tl.cast(mine, tl.int64)
    k += at * k_t
    b_k = load_rows(k, row, k_t, live, i, K, BLOCK_K)
    b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK_V)
    b_dk = tl.zeros((C, BLOCK_K), tl.float32)
    b_dv = tl.zeros((C, BLOCK_V), tl.float32)
    if HAS_STATE:
        S, z = at_chunk(S, z, head * tl.cdiv(T, L) + mine // L, V, BLOCK_K, WIDE)
        b_dv, b_dk = through_state(
            k, k_t, live, b_k, b_v, S, b_dv, b_dk, scale, K, V, BLOCK_K, BLOCK_V, ROWS, True, True, PRECISION
        )
        second, linear, _ = through_norm(b_k, z, K, BLOCK_K, WIDE, PRECISION)
        b_dk += second + linear[None, :]
    for offset in tl.static_range(0, C, N):
        b_dk, b_dv = differentiate_key(
            b_k, b_v, mine, q, q_t, do, do_t, n, m, mine + offset, T, scale, b_dk, b_dv,
            K, V, BLOCK_K, BLOCK_V, N, True, PRECISION,
        )  # fmt: skip
    for first in range(mine + C, tl.minimum(mine // L * L + L, T), N):
        b_dk, b_dv = differentiate_key(
            b_k, b_v, mine, q, q_t, do, do_t, n, m, first, T, scale, b_dk, b_dv,
            K, V, BLOCK_K, BLOCK_V, N, False, PRECISION,
        )  # fmt: skip
    tokens = (b * T + at) * H + h
    store_rows(dk + tokens * K, b_dk * (2.0 * scale), row, H * K, live, i, K, BLOCK_K)
    store_rows(dv + tokens * V, b_dv, row, H * V, live, j, V, BLOCK_V)
