"""Taylor attention through its state, linear in T. The features live in registers only.

A feature is a product of two numbers out of (1, x_1, ..., x_K), times a weight. The two factors are picked by products
with one-hot matrices, `left` and `right`, so phi(x) = weight * (x left) * (x right), where a missing channel stands
for 1. The F features come as two tiles of powers of 2, FA + FB >= F.

With n_t = phi(q_t).z_t + eps, r_t = do_t / n_t and m_t = -do_t.o_t / n_t, the gradients are recurrences too, on
D_t = sum_{t'>=t} phi(q_t') r_t'^T and w_t = sum_{t'>=t} phi(q_t') m_t':

    dphi(q_t) = S_t r_t + m_t z_t      dphi(k_t) = D_t v_t + w_t      dv_t = D_t^T phi(k_t)

Within a chunk pairs are summed as in attention, with the care for the first tokens that is explained in
quadratic_kernels.py; the states hold what is outside it. Blocks of v's columns are separate
programs. What sums over all columns, dq, dk and dz, is a part per block, and m is too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import load_rows, product_in_two, store_rows


@triton.jit
def feature(f, K: tl.constexpr):
    """The two channels of feature f, K standing for the factor 1, -1 where f >= F; and its weight."""
    pair = f - 1 - K
    left = tl.zeros_like(f)
    for m in tl.static_range(1, K):
        left += (pair >= m * K - m * (m - 1) // 2).to(tl.int32)
    right = pair - (left * K - left * (left - 1) // 2) + left
    weight = tl.where(left == right, 0.7071067811865476, 1.0) * (1.0 / K) ** 0.5
    single = pair < 0
    left = tl.where(single, K, left)
    right = tl.where(single, tl.where(f == 0, K, f - 1), right)
    weight = tl.where(single, tl.where(f == 0, 1.0, (1.0 / K) ** 0.25), weight)
    valid = f < 1 + K + K * (K + 1) // 2
    return tl.where(valid, left, -1), tl.where(valid, right, -1), weight


@triton.jit
def picks(channel, K: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr):
    """One-hot (BLOCK_K, features): which channel of x is the factor."""
    return ((tl.arange(0, BLOCK_K)[:, None] == channel[None, :]) & (channel[None, :] < K)).to(dtype)


@triton.jit
def picks_transposed(channel, K: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr):
    return ((tl.arange(0, BLOCK_K)[None, :] == channel[:, None]) & (channel[:, None] < K)).to(dtype)


@triton.jit
def factor(x, channel, K: tl.constexpr, PRECISION: tl.constexpr):
    """(tokens, features): x at `channel`, 1 where that is K."""
    one = (channel == K).to(tl.float32)[None, :]
    return tl.dot(x, picks(channel, K, x.shape[1], x.dtype), input_precision=PRECISION) + one


@triton.jit
def features(x, f, K: tl.constexpr, PRECISION: tl.constexpr):
    """phi(x) (tokens, features)."""
    left, right, weight = feature(f, K)
    return factor(x, left, K, PRECISION) * factor(x, right, K, PRECISION) * weight[None, :]


@triton.jit
def features_transposed(x, f, K: tl.constexpr, PRECISION: tl.constexpr):
    """phi(x)^T (features, tokens), made in this orientation: a product is never transposed."""
    left, right, weight = feature(f, K)
    x_t = tl.trans(x)
    one = (left == K).to(tl.float32)[:, None]
    product = tl.dot(picks_transposed(left, K, x.shape[1], x.dtype), x_t, input_precision=PRECISION) + one
    one = (right == K).to(tl.float32)[:, None]
    product *= tl.dot(picks_transposed(right, K, x.shape[1], x.dtype), x_t, input_precision=PRECISION) + one
    return product * weight[:, None]


@triton.jit
def through_features(dphi, x, f, dx, K: tl.constexpr, PRECISION: tl.constexpr):
    """dx + the gradient of x behind dphi (tokens, features)."""
    left, right, weight = feature(f, K)
    dphi *= weight[None, :]
    by_left = (dphi * factor(x, right, K, PRECISION)).to(x.dtype)
    dx = tl.dot(by_left, picks_transposed(left, K, x.shape[1], x.dtype), dx, input_precision=PRECISION)
    by_right = (dphi * factor(x, left, K, PRECISION)).to(x.dtype)
    return tl.dot(by_right, picks_transposed(right, K, x.shape[1], x.dtype), dx, input_precision=PRECISION)


@triton.jit
def load_state(S, f, j, F: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr, GIVEN: tl.constexpr):
    """A tile (features, columns) of a state, or its transpose; zeros where none is given."""
    if TRANSPOSED:
        pointers, mask = S + f[None, :] * V + j[:, None], (f < F)[None, :] & (j < V)[:, None]
    else:
        pointers, mask = S + f[:, None] * V + j[None, :], (f < F)[:, None] & (j < V)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32) if GIVEN else tl.zeros(pointers.shape, tl.float32)


@triton.jit
def load_norm(z, f, F: tl.constexpr, GIVEN: tl.constexpr):
    return tl.load(z + f, mask=f < F, other=0.0).to(tl.float32) if GIVEN else tl.zeros(f.shape, tl.float32)


@kernel
def forward_kernel(
    q, k, v, o, n, S, z, S_last, z_last, T, H, scale, eps,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    FA: tl.constexpr, FB: tl.constexpr, C: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and BLOCK columns of v."""
    wait_for_earlier()
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    column = tl.program_id(0) % blocks * BLOCK
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    tokens = b * T * H + h
    dtype = q.dtype.element_ty
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = column + tl.arange(0, BLOCK)
    f_a = tl.arange(0, FA)
    f_b = FA + tl.arange(0, FB)
    S_a = load_state(S + head * F * V, f_a, j, F, V, False, HAS_FIRST)
    S_b = load_state(S + head * F * V, f_b, j, F, V, False, HAS_FIRST)
    z_a = load_norm(z + head * F, f_a, F, HAS_FIRST)
    z_b = load_norm(z + head * F, f_b, F, HAS_FIRST)
    causal = row[:, None] >= row[None, :]
    for chunk in range(tl.cdiv(T, C)):
        at = tl.cast(chunk * C, tl.int64)
        live = chunk * C + row < T
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        p = tl.where(causal, s * (0.5 * s + 1.0) + 1.0, 0.0)
        norm = tl.sum(p, 1) + eps
        total = product_in_two(p, b_v, tl.zeros((C, BLOCK), tl.float32), PRECISION)
        phi = features(b_q, f_a, K, PRECISION)
        norm += tl.sum(phi * z_a[None, :], 1)
        total = tl.dot(phi.to(dtype), S_a.to(dtype), total, input_precision=PRECISION)
        phi = features(b_q, f_b, K, PRECISION)
        norm += tl.sum(phi * z_b[None, :], 1)
        total = tl.dot(phi.to(dtype), S_b.to(dtype), total, input_precision=PRECISION)
        store_rows(o + (tokens + at * H) * V, total / norm[:, None], row, H * V, live, j, V, BLOCK)
        if column == 0:
            tl.store(n + tokens + (at + row) * H, norm, mask=live)
        # Padding has phi(0) = (1, 0, ...), which must not be counted.
        phi = tl.where(live[None, :], features_transposed(b_k, f_a, K, PRECISION), 0.0)
        z_a += tl.sum(phi, 1)
        S_a = tl.dot(phi.to(dtype), b_v, S_a, input_precision=PRECISION)
        phi = tl.where(live[None, :], features_transposed(b_k, f_b, K, PRECISION), 0.0)
        z_b += tl.sum(phi, 1)
        S_b = tl.dot(phi.to(dtype), b_v, S_b, input_precision=PRECISION)
    if HAS_LAST:
        S_last += head * F * V
        inside = (j < V)[None, :]
        tl.store(S_last + f_a[:, None] * V + j[None, :], S_a, mask=(f_a < F)[:, None] & inside)
        tl.store(S_last + f_b[:, None] * V + j[None, :], S_b, mask=(f_b < F)[:, None] & inside)
        if column == 0:
            tl.store(z_last + head * F + f_a, z_a, mask=f_a < F)
            tl.store(z_last + head * F + f_b, z_b, mask=f_b < F)


@triton.jit
def slopes(do, do_t, o, o_t, n, n_t, at, row, live, j, V: tl.constexpr, BLOCK: tl.constexpr):
    """do, 1 / n_t, and this block's part of m_t."""
    b_do = load_rows(do + at * do_t, row, do_t, live, j, V, BLOCK)
    b_o = load_rows(o + at * o_t, row, o_t, live, j, V, BLOCK)
    over_norm = 1.0 / tl.load(n + (at + row) * n_t, mask=live, other=1.0)
    return b_do, over_norm, -tl.sum(b_do.to(tl.float32) * b_o, 1) * over_norm


@triton.jit
def query_gradient(
    q, q_t, k, k_t, v, v_t, o, o_t, n, n_t, do, do_t, dq, S, z, T, scale, j,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    FA: tl.constexpr, FB: tl.constexpr, C: tl.constexpr, HAS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = q.dtype.element_ty
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    f_a = tl.arange(0, FA)
    f_b = FA + tl.arange(0, FB)
    S_a = load_state(S, f_a, j, F, V, True, HAS_FIRST)
    S_b = load_state(S, f_b, j, F, V, True, HAS_FIRST)
    z_a = load_norm(z, f_a, F, HAS_FIRST)
    z_b = load_norm(z, f_b, F, HAS_FIRST)
    causal = row[:, None] >= row[None, :]
    for chunk in range(tl.cdiv(T, C)):
        at = tl.cast(chunk * C, tl.int64)
        live = chunk * C + row < T
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK)
        b_do, over_norm, m = slopes(do, do_t, o, o_t, n, n_t, at, row, live, j, V, BLOCK)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) * over_norm[:, None]
        if not HAS_FIRST:
            p = tl.where(causal, s * (0.5 * s + 1.0) + 1.0, 0.0)
            m = tl.where(chunk == 0, -tl.sum(p * dp, 1) * over_norm, m)
        ds = tl.where(causal, (dp + m[:, None]) * (1.0 + s), 0.0) * scale
        b_dq = product_in_two(ds, b_k, tl.zeros((C, BLOCK_K), tl.float32), PRECISION)
        dphi = tl.dot(b_do, S_a.to(dtype), input_precision=PRECISION) * over_norm[:, None] + m[:, None] * z_a[None, :]
        b_dq = through_features(dphi, b_q, f_a, b_dq, K, PRECISION)
        dphi = tl.dot(b_do, S_b.to(dtype), input_precision=PRECISION) * over_norm[:, None] + m[:, None] * z_b[None, :]
        b_dq = through_features(dphi, b_q, f_b, b_dq, K, PRECISION)
        store_rows(dq + at * n_t * K, b_dq, row, n_t * K, live, i, K, BLOCK_K)
        phi = tl.where(live[:, None], features(b_k, f_a, K, PRECISION), 0.0)
        z_a += tl.sum(phi, 0)
        S_a = tl.dot(tl.trans(b_v), phi.to(dtype), S_a, input_precision=PRECISION)
        phi = tl.where(live[:, None], features(b_k, f_b, K, PRECISION), 0.0)
        z_b += tl.sum(phi, 0)
        S_b = tl.dot(tl.trans(b_v), phi.to(dtype), S_b, input_precision=PRECISION)


@triton.jit
def key_gradient(
    q, q_t, k, k_t, v, v_t, o, o_t, n, n_t, do, do_t, dk, D, w, w_first, T, scale, j,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    FA: tl.constexpr, FB: tl.constexpr, C: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = q.dtype.element_ty
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    f_a = tl.arange(0, FA)
    f_b = FA + tl.arange(0, FB)
    D_a = load_state(D, f_a, j, F, V, True, HAS_LAST)
    D_b = load_state(D, f_b, j, F, V, True, HAS_LAST)
    # The gradient of the final z counts once: the first block takes it.
    mine = tl.where(tl.min(j, 0) == 0, 1.0, 0.0)
    w_a = load_norm(w, f_a, F, HAS_LAST) * mine
    w_b = load_norm(w, f_b, F, HAS_LAST) * mine
    causal = row[:, None] <= row[None, :]
    chunks = tl.cdiv(T, C)
    for step in range(chunks):
        start = (chunks - 1 - step) * C
        at = tl.cast(start, tl.int64)
        live = start + row < T
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK)
        b_do, over_norm, m = slopes(do, do_t, o, o_t, n, n_t, at, row, live, j, V, BLOCK)
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) * over_norm[None, :]
        if not HAS_FIRST:
            p = tl.where(causal, s * (0.5 * s + 1.0) + 1.0, 0.0)
            m = tl.where(start == 0, -tl.sum(p * dp, 0) * over_norm, m)
        ds = tl.where(causal, (dp + m[None, :]) * (1.0 + s), 0.0) * scale
        b_dk = product_in_two(ds, b_q, tl.zeros((C, BLOCK_K), tl.float32), PRECISION)
        dphi = tl.dot(b_v, D_a.to(dtype), input_precision=PRECISION) + w_a[None, :]
        b_dk = through_features(dphi, b_k, f_a, b_dk, K, PRECISION)
        dphi = tl.dot(b_v, D_b.to(dtype), input_precision=PRECISION) + w_b[None, :]
        b_dk = through_features(dphi, b_k, f_b, b_dk, K, PRECISION)
        store_rows(dk + at * n_t * K, b_dk, row, n_t * K, live, i, K, BLOCK_K)
        phi = features(b_q, f_a, K, PRECISION)
        w_a += tl.sum(phi * m[:, None], 0)
        D_a = tl.dot(tl.trans(b_do), (phi * over_norm[:, None]).to(dtype), D_a, input_precision=PRECISION)
        phi = features(b_q, f_b, K, PRECISION)
        w_b += tl.sum(phi * m[:, None], 0)
        D_b = tl.dot(tl.trans(b_do), (phi * over_norm[:, None]).to(dtype), D_b, input_precision=PRECISION)
    if HAS_FIRST:
        tl.store(w_first + f_a, w_a, mask=f_a < F)
        tl.store(w_first + f_b, w_b, mask=f_b < F)


@triton.jit
def value_gradient(
    q, q_t, k, k_t, n, n_t, do, do_t, dv, dv_t, D, D_first, T, scale, j,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    FA: tl.constexpr, FB: tl.constexpr, C: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = q.dtype.element_ty
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    f_a = tl.arange(0, FA)
    f_b = FA + tl.arange(0, FB)
    D_a = load_state(D, f_a, j, F, V, False, HAS_LAST)
    D_b = load_state(D, f_b, j, F, V, False, HAS_LAST)
    causal = row[:, None] <= row[None, :]
    chunks = tl.cdiv(T, C)
    for step in range(chunks):
        start = (chunks - 1 - step) * C
        at = tl.cast(start, tl.int64)
        live = start + row < T
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_do = load_rows(do + at * do_t, row, do_t, live, j, V, BLOCK)
        over_norm = 1.0 / tl.load(n + (at + row) * n_t, mask=live, other=1.0)
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        p = tl.where(causal, s * (0.5 * s + 1.0) + 1.0, 0.0) * over_norm[None, :]
        b_dv = product_in_two(p, b_do, tl.zeros((C, BLOCK), tl.float32), PRECISION)
        phi = features(b_k, f_a, K, PRECISION).to(dtype)
        b_dv = tl.dot(phi, D_a.to(dtype), b_dv, input_precision=PRECISION)
        phi = features(b_k, f_b, K, PRECISION).to(dtype)
        b_dv = tl.dot(phi, D_b.to(dtype), b_dv, input_precision=PRECISION)
        store_rows(dv + at * dv_t, b_dv, row, dv_t, live, j, V, BLOCK)
        phi = (features_transposed(b_q, f_a, K, PRECISION) * over_norm[None, :]).to(dtype)
        D_a = tl.dot(phi, b_do, D_a, input_precision=PRECISION)
        phi = (features_transposed(b_q, f_b, K, PRECISION) * over_norm[None, :]).to(dtype)
        D_b = tl.dot(phi, b_do, D_b, input_precision=PRECISION)
    if HAS_FIRST:
        inside = (j < V)[None, :]
        tl.store(D_first + f_a[:, None] * V + j[None, :], D_a, mask=(f_a < F)[:, None] & inside)
        tl.store(D_first + f_b[:, None] * V + j[None, :], D_b, mask=(f_b < F)[:, None] & inside)


@kernel
def backward_kernel(
    q, k, v, o, n, S, z, do, dS, dz, dq, dk, dv, dS_first, dz_first, T, H, scale, dqk_block,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    FA: tl.constexpr, FB: tl.constexpr, C: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head, BLOCK columns of v, and dq, dk or dv."""
    wait_for_earlier()
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    role = tl.program_id(0) % 3
    block = tl.program_id(0) // 3 % blocks
    head = tl.cast(tl.program_id(0) // (3 * blocks), tl.int64)
    b, h = head // H, head % H
    j = block * BLOCK + tl.arange(0, BLOCK)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    do += b * do_b + h * do_h
    tokens = b * T * H + h
    o += tokens * V
    n += tokens
    part = tl.cast(block, tl.int64) * dqk_block + tokens * K
    state = head * F * V
    if role == 0:
        query_gradient(
            q, q_t, k, k_t, v, v_t, o, H * V, n, H, do, do_t, dq + part, S + state, z + head * F, T, scale, j,
            K, V, F, BLOCK_K, BLOCK, FA, FB, C, HAS_FIRST, PRECISION,
        )  # fmt: skip
    elif role == 1:
        key_gradient(
            q, q_t, k, k_t, v, v_t, o, H * V, n, H, do, do_t, dk + part, dS + state, dz + head * F,
            dz_first + (head * blocks + block) * F, T, scale, j,
            K, V, F, BLOCK_K, BLOCK, FA, FB, C, HAS_FIRST, HAS_LAST, PRECISION,
        )  # fmt: skip
    else:
        value_gradient(
            q, q_t, k, k_t, n, H, do, do_t, dv + tokens * V, H * V, dS + state, dS_first + state, T, scale, j,
            K, V, F, BLOCK_K, BLOCK, FA, FB, C, HAS_FIRST, HAS_LAST, PRECISION,
        )  # fmt: skip
