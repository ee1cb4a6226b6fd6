"""Attention over blocks of queries and keys (arXiv 2307.08691), for as many keys as lie in a few blocks.

q, k and v (B, T, H, K) have any strides but that of channels; all else is contiguous. log_sum and delta (B, T, H).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import LOG2E, load_rows, store_rows


@triton.jit
def _place(q, k, v, T, H, q_b, q_h, k_b, k_h, v_b, v_h, BLOCK: tl.constexpr):
    """The block of this program, the first row of its sequence and head, and where their q, k and v are."""
    blocks = tl.cdiv(T, BLOCK)
    head = tl.program_id(0) // blocks % H
    batch = (tl.program_id(0) // blocks // H).to(tl.int64)
    first = batch * T * H + head
    return (
        tl.program_id(0) % blocks, first,
        q + batch * q_b + head * q_h, k + batch * k_b + head * k_h, v + batch * v_b + head * v_h,
    )  # fmt: skip


@triton.jit
def _scores(rows, columns, n, m, window, scale, PRECISION: tl.constexpr):
    """Scaled products in units of log2, -inf where the query at n does not see the key at m. Either may be the rows."""
    scores = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * (scale * LOG2E)
    return tl.where((m <= n) & (m > n - window), scores, float("-inf"))


@kernel
def forward_kernel(
    q, k, v, o, log_sum, T, H, window, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, and log_sum in units of log2, of BLOCK queries."""
    wait_for_earlier()
    block, first, q, k, v = _place(q, k, v, T, H, q_b, q_h, k_b, k_h, v_b, v_h, BLOCK)
    within, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    n = block * BLOCK + within
    b_q = load_rows(q, n.to(tl.int64), q_t, n < T, d, K, BLOCK_K)
    # A number, for blocks without any key to see.
    largest = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    b_o = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for i in range(tl.maximum(block * BLOCK - window + 1, 0) // BLOCK, block + 1):
        m = i * BLOCK + within
        b_k = load_rows(k, m.to(tl.int64), k_t, m < T, d, K, BLOCK_K)
        b_v = load_rows(v, m.to(tl.int64), v_t, m < T, d, K, BLOCK_K)
        scores = _scores(b_q, b_k, n[:, None], m[None, :], window, scale, PRECISION)
        highest = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(largest - highest)
        total = total * shrink + tl.sum(p, 1)
        b_o = tl.dot(p.to(b_v.dtype), b_v, b_o * shrink[:, None], input_precision=PRECISION)
        largest = highest
    row = first + n * H
    store_rows(o, b_o / total[:, None], row, K, n < T, d, K, BLOCK_K)
    tl.store(log_sum + row, largest + tl.log2(total), mask=n < T)


@kernel
def query_kernel(
    q, k, v, o, log_sum, do, dq, delta, T, H, window, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK queries and, for the gradients of the keys, delta = do . o."""
    wait_for_earlier()
    block, first, q, k, v = _place(q, k, v, T, H, q_b, q_h, k_b, k_h, v_b, v_h, BLOCK)
    within, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    n = block * BLOCK + within
    row = first + n * H
    b_q = load_rows(q, n.to(tl.int64), q_t, n < T, d, K, BLOCK_K)
    b_do = load_rows(do, row, K, n < T, d, K, BLOCK_K)
    b_o = load_rows(o, row, K, n < T, d, K, BLOCK_K)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(delta + row, b_delta, mask=n < T)
    b_log_sum = tl.load(log_sum + row, mask=n < T, other=0.0)
    b_dq = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for i in range(tl.maximum(block * BLOCK - window + 1, 0) // BLOCK, block + 1):
        m = i * BLOCK + within
        b_k = load_rows(k, m.to(tl.int64), k_t, m < T, d, K, BLOCK_K)
        b_v = load_rows(v, m.to(tl.int64), v_t, m < T, d, K, BLOCK_K)
        scores = _scores(b_q, b_k, n[:, None], m[None, :], window, scale, PRECISION)
        p = tl.exp2(scores - b_log_sum[:, None])
        slope = p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
        b_dq = tl.dot(slope.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    store_rows(dq, b_dq * scale, row, K, n < T, d, K, BLOCK_K)


@kernel
def key_kernel(
    q, k, v, log_sum, do, delta, dk, dv, T, H, window, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK keys."""
    wait_for_earlier()
    block, first, q, k, v = _place(q, k, v, T, H, q_b, q_h, k_b, k_h, v_b, v_h, BLOCK)
    within, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    m = block * BLOCK + within
    b_k = load_rows(k, m.to(tl.int64), k_t, m < T, d, K, BLOCK_K)
    b_v = load_rows(v, m.to(tl.int64), v_t, m < T, d, K, BLOCK_K)
    b_dk = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    b_dv = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for i in range(block, tl.minimum(block * BLOCK + BLOCK - 2 + window, T - 1) // BLOCK + 1):
        n = i * BLOCK + within
        row = first + n * H
        b_q = load_rows(q, n.to(tl.int64), q_t, n < T, d, K, BLOCK_K)
        b_do = load_rows(do, row, K, n < T, d, K, BLOCK_K)
        b_delta = tl.load(delta + row, mask=n < T, other=0.0)
        # Queries past the end weigh nothing.
        b_log_sum = tl.load(log_sum + row, mask=n < T, other=float("inf"))
        scores = _scores(b_k, b_q, n[None, :], m[:, None], window, scale, PRECISION)
        p = tl.exp2(scores - b_log_sum[None, :])
        b_dv = tl.dot(p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        slope = p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta[None, :])
        b_dk = tl.dot(slope.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    row = first + m * H
    store_rows(dk, b_dk * scale, row, K, m < T, d, K, BLOCK_K)
    store_rows(dv, b_dv, row, K, m < T, d, K, BLOCK_K)
