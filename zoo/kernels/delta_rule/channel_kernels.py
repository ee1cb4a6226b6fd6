"""The generalised delta rule, where every channel has its own decay.

Inside a chunk, with S the state before it, a_c(t, s) = exp(g_{s+1,c} + ... + g_{t,c}) and a_c(t) the decay since its
start, the scores of readers x after their step and of writers y, and those of the reader a before its step, are

    P^y_ts = sum_c q_tc a_c(t, s) y_sc, s <= t,     A^y_ts = sum_c a_tc a_c(t-1, s) y_sc, s < t,     y in b, k

    u_t = (a(t-1) * a_t)^T S + sum_s A^b_ts u_s + A^k_ts v_s        or  u = X r,  X = (I - A^b)^-1
    o_t = (a(t) * q_t)^T S   + sum_s P^b_ts u_s + P^k_ts v_s

No state is needed for the scores or for the decayed q, a, b and k: `prepare_kernel` makes them for all chunks at once,
and the walks through the chunks see no decay but that of the state across a chunk. The walk back leaves the gradients
of all that; `finish_kernel` turns them into those of q, a, b, k and g, again for all chunks at once.

Inside a chunk a(t, s) is split into factors of t and of s, none above 1: in an aligned block of 2h steps the first h
reach the last h through its middle, and h from 1 to C/2 covers every pair once. The logarithms of the factors are
products of g with a matrix of 0 and 1, and dg collects slopes through the same matrix transposed, so nothing small is a
difference of large sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.delta_rule.triangles import inverse, load_square, pairs_of_halves, store_transposed
from zoo.kernels.tiles import LOG2E, load_rows, store_rows


@triton.jit
def to_middle(h: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """1 at (s, u) where the decay of step u lies between step s and the middle of its block of 2h, else 0.

    With BEFORE a step of a last half stands before its own decay.
    """
    s = tl.arange(0, C)[None, :] if TRANSPOSED else tl.arange(0, C)[:, None]
    u = tl.arange(0, C)[:, None] if TRANSPOSED else tl.arange(0, C)[None, :]
    since = u < s if BEFORE else u <= s
    last = (s // h) % 2 == 1
    return ((s // h == u // h) & ((last & since) | ((s // h) % 2 == 0) & (u > s))).to(tl.float32)


@triton.jit
def load_decays(g, row, stride_t, stride_c, live, i, K: tl.constexpr):
    """Log2 decays of steps and channels. Below -1000 nothing is left anyway."""
    x = tl.load(g + row[:, None] * stride_t + i[None, :] * stride_c, mask=live[:, None] & (i < K)[None, :], other=0.0)
    return tl.maximum(x.to(tl.float32) * LOG2E, -1000.0)


@triton.jit
def prepare_kernel(
    q, k, a, b, g, decayed, scores, totals, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, g_b, g_t, g_h, g_c,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, HALVINGS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """decayed (B, H, 4, T, K): q, a from, and b, k to the border of their chunk; scores (B, H, chunks, 4, C, C):
    X, A^k, P^b, P^k; totals (B, H, chunks, K): the decay across a chunk. One program per chunk."""
    dtype = decayed.dtype.element_ty
    chunks = tl.cdiv(T, C)
    chunk = tl.cast(tl.program_id(0), tl.int64)
    head = chunk // chunks
    n, h = head // H, head % H
    at = chunk % chunks * C
    row = tl.arange(0, C)
    before = (row[None, :] < row[:, None]).to(tl.float32)
    live = at + row < T
    i = tl.arange(0, BLOCK_K)
    b_q = load_rows(q + n * q_b + h * q_h + at * q_t, row, q_t, live, i, K, BLOCK_K)
    b_k = load_rows(k + n * k_b + h * k_h + at * k_t, row, k_t, live, i, K, BLOCK_K)
    b_a = load_rows(a + n * a_b + h * a_h + at * a_t, row, a_t, live, i, K, BLOCK_K)
    b_b = load_rows(b + n * b_b + h * b_h + at * b_t, row, b_t, live, i, K, BLOCK_K)
    b_g = load_decays(g + n * g_b + h * g_h + at * g_t, row, g_t, g_c, live, i, K)

    diagonal = row[:, None] == row[None, :]
    Ab = tl.zeros((C, C), tl.float32)
    Ak = tl.zeros((C, C), tl.float32)
    Pb = tl.where(diagonal, tl.sum(b_q.to(tl.float32) * b_b, 1)[:, None], 0.0)
    Pk = tl.where(diagonal, tl.sum(b_q.to(tl.float32) * b_k, 1)[:, None], 0.0)
    for doubling in tl.static_range(HALVINGS):
        kept = tl.exp2(tl.dot(to_middle(1 << doubling, C, False, False), b_g, input_precision=PRECISION))
        kept_a = tl.exp2(tl.dot(to_middle(1 << doubling, C, True, False), b_g, input_precision=PRECISION))
        far_q = tl.trans((b_q * kept).to(dtype))
        far_a = tl.trans((b_a * kept_a).to(dtype))
        near_b = (b_b * kept).to(dtype)
        near_k = (b_k * kept).to(dtype)
        Ab += pairs_of_halves(tl.dot(near_b, far_a, input_precision=PRECISION), 1 << doubling, C)
        Ak += pairs_of_halves(tl.dot(near_k, far_a, input_precision=PRECISION), 1 << doubling, C)
        Pb += pairs_of_halves(tl.dot(near_b, far_q, input_precision=PRECISION), 1 << doubling, C)
        Pk += pairs_of_halves(tl.dot(near_k, far_q, input_precision=PRECISION), 1 << doubling, C)
    scores += chunk * 4 * C * C
    store_transposed(scores, inverse(-Ab, C, HALVINGS, PRECISION), C)
    store_transposed(scores + C * C, Ak, C)
    store_transposed(scores + 2 * C * C, Pb, C)
    store_transposed(scores + 3 * C * C, Pk, C)

    since = tl.exp2(tl.dot((row[None, :] <= row[:, None]).to(tl.float32), b_g, input_precision=PRECISION))
    since_a = tl.exp2(tl.dot(before, b_g, input_precision=PRECISION))
    until = tl.exp2(tl.dot((row[None, :] > row[:, None]).to(tl.float32), b_g, input_precision=PRECISION))
    size = tl.cast(T, tl.int64) * K
    decayed += head * 4 * size + at * K
    store_rows(decayed, b_q * since, row, K, live, i, K, BLOCK_K)
    store_rows(decayed + size, b_a * since_a, row, K, live, i, K, BLOCK_K)
    store_rows(decayed + 2 * size, b_b * until, row, K, live, i, K, BLOCK_K)
    store_rows(decayed + 3 * size, b_k * until, row, K, live, i, K, BLOCK_K)
    tl.store(totals + chunk * K + i, tl.exp2(tl.sum(b_g, 0)), mask=i < K)


@triton.jit
def forward_kernel(
    v, decayed, scores, totals, first, o, u, last, T, H, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and u; one program per sequence, head and BLOCK columns of v."""
    dtype = decayed.dtype.element_ty
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    column = tl.program_id(0) % blocks * BLOCK
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    n, h = head // H, head % H
    v += n * v_b + h * v_h
    o += (n * T * H + h) * V
    u += (n * T * H + h) * V
    size = tl.cast(T, tl.int64) * K
    decayed += head * 4 * size
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
    scores += head * chunks * 4 * C * C
    totals += head * chunks * K
    for chunk in range(chunks):
        at = tl.cast(chunk, tl.int64) * C
        live = at + row < T
        b_q = load_rows(decayed + at * K, row, K, live, i, K, BLOCK_K)
        b_a = load_rows(decayed + size + at * K, row, K, live, i, K, BLOCK_K)
        b_b = load_rows(decayed + 2 * size + at * K, row, K, live, i, K, BLOCK_K)
        b_k = load_rows(decayed + 3 * size + at * K, row, K, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK)
        b_X = load_square(scores + at * 4 * C, C)
        b_Ak = load_square(scores + at * 4 * C + C * C, C)
        b_Pb = load_square(scores + at * 4 * C + 2 * C * C, C)
        b_Pk = load_square(scores + at * 4 * C + 3 * C * C, C)
        total = tl.load(totals + tl.cast(chunk, tl.int64) * K + i, mask=i < K, other=0.0)
        r = tl.dot(b_Ak, b_v, input_precision=PRECISION)
        r = tl.dot(b_a, S.to(dtype), r, input_precision=PRECISION)
        b_u = tl.dot(b_X, r.to(dtype), input_precision=PRECISION)
        b_o = tl.dot(b_q, S.to(dtype), input_precision=PRECISION)
        b_o = tl.dot(b_Pk, b_v, b_o, input_precision=PRECISION)
        b_o = tl.dot(b_Pb, b_u.to(dtype), b_o, input_precision=PRECISION)
        store_rows(u + at * H * V, b_u, row, H * V, live, j, V, BLOCK)
        store_rows(o + at * H * V, b_o, row, H * V, live, j, V, BLOCK)
        S *= total[:, None]
        S = tl.dot(tl.trans(b_k), b_v, S, input_precision=PRECISION)
        S = tl.dot(tl.trans(b_b), b_u.to(dtype), S, input_precision=PRECISION)
    if HAS_LAST:
        tl.store(last + state, S, mask=inside)


@triton.jit
def backward_kernel(
    v, u, decayed, scores, totals, first, do, dlast, states, dv, d_decayed, d_scores, across, dfirst, T, H, heads,
    v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From BLOCK columns of v: dv, and a part (blocks, ...) of the gradients of decayed and of scores, row s by column
    t and A^b in place of X, and of dg's share of what goes across the chunk (B, H, chunks, K).

    As in `scalar_kernels`, states holds the transposed states before the chunks, and dr and dS stay transposed.
    """
    dtype = decayed.dtype.element_ty
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % blocks
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    n, h = head // H, head % H
    v += n * v_b + h * v_h
    do += n * do_b + h * do_h
    u += (n * T * H + h) * V
    dv += (n * T * H + h) * V
    chunks = tl.cdiv(T, C)
    part = tl.cast(block, tl.int64) * heads + head
    size = tl.cast(T, tl.int64) * K
    decayed += head * 4 * size
    scores += head * chunks * 4 * C * C
    totals += head * chunks * K
    d_decayed += part * 4 * size
    d_scores += part * chunks * 4 * C * C
    across += part * chunks * K
    states += tl.cast(tl.program_id(0), tl.int64) * chunks * BLOCK * BLOCK_K
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = block * BLOCK + tl.arange(0, BLOCK)
    inside = (j < V)[:, None] & (i < K)[None, :]
    state = head * K * V + i[None, :] * V + j[:, None]
    tile = tl.arange(0, BLOCK)[:, None] * BLOCK_K + i[None, :]

    if HAS_FIRST:
        S = tl.load(first + state, mask=inside, other=0.0)
    else:
        S = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for chunk in range(chunks):
        at = tl.cast(chunk, tl.int64) * C
        live = at + row < T
        tl.store(states + tl.cast(chunk, tl.int64) * BLOCK * BLOCK_K + tile, S.to(dtype))
        b_b = load_rows(decayed + 2 * size + at * K, row, K, live, i, K, BLOCK_K)
        b_k = load_rows(decayed + 3 * size + at * K, row, K, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK)
        b_u = load_rows(u + at * H * V, row, H * V, live, j, V, BLOCK)
        S *= tl.load(totals + tl.cast(chunk, tl.int64) * K + i, mask=i < K, other=0.0)[None, :]
        S = tl.dot(tl.trans(b_v), b_k, S, input_precision=PRECISION)
        S = tl.dot(tl.trans(b_u), b_b, S, input_precision=PRECISION)
    # The states are read by other threads than wrote them.
    tl.debug_barrier()

    if HAS_LAST:
        dS = tl.load(dlast + state, mask=inside, other=0.0)
    else:
        dS = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    earlier = row[:, None] < row[None, :]
    until_now = row[:, None] <= row[None, :]
    square = row[:, None] * C + row[None, :]
    for back in range(chunks):
        chunk = chunks - 1 - back
        at = tl.cast(chunk, tl.int64) * C
        live = at + row < T
        b_q = load_rows(decayed + at * K, row, K, live, i, K, BLOCK_K)
        b_a = load_rows(decayed + size + at * K, row, K, live, i, K, BLOCK_K)
        b_b = load_rows(decayed + 2 * size + at * K, row, K, live, i, K, BLOCK_K)
        b_k = load_rows(decayed + 3 * size + at * K, row, K, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK)
        b_u = load_rows(u + at * H * V, row, H * V, live, j, V, BLOCK)
        b_do = load_rows(do + at * do_t, row, do_t, live, j, V, BLOCK)
        b_X = load_square(scores + at * 4 * C, C)
        b_Ak = load_square(scores + at * 4 * C + C * C, C)
        b_Pb = load_square(scores + at * 4 * C + 2 * C * C, C)
        b_Pk = load_square(scores + at * 4 * C + 3 * C * C, C)
        b_S = tl.load(states + tl.cast(chunk, tl.int64) * BLOCK * BLOCK_K + tile)
        total = tl.load(totals + tl.cast(chunk, tl.int64) * K + i, mask=i < K, other=0.0)

        now = dS.to(dtype)
        du = tl.dot(now, tl.trans(b_b), input_precision=PRECISION)
        du = tl.dot(tl.trans(b_do), b_Pb, du, input_precision=PRECISION)
        dr = tl.dot(du.to(dtype), b_X, input_precision=PRECISION).to(dtype)
        b_dv = tl.dot(now, tl.trans(b_k), input_precision=PRECISION)
        b_dv = tl.dot(tl.trans(b_do), b_Pk, b_dv, input_precision=PRECISION)
        b_dv = tl.dot(dr, b_Ak, b_dv, input_precision=PRECISION)
        tl.store(
            dv + at * H * V + row[None, :] * (H * V) + j[:, None],
            b_dv.to(dv.dtype.element_ty), mask=live[None, :] & (j < V)[:, None],
        )  # fmt: skip

        dAb = tl.where(earlier, tl.dot(b_u, dr, input_precision=PRECISION), 0.0)
        dAk = tl.where(earlier, tl.dot(b_v, dr, input_precision=PRECISION), 0.0)
        dPb = tl.where(until_now, tl.dot(b_u, tl.trans(b_do), input_precision=PRECISION), 0.0)
        dPk = tl.where(until_now, tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION), 0.0)
        d_square = d_scores + at * 4 * C + square
        tl.store(d_square, dAb.to(dtype))
        tl.store(d_square + C * C, dAk.to(dtype))
        tl.store(d_square + 2 * C * C, dPb.to(dtype))
        tl.store(d_square + 3 * C * C, dPk.to(dtype))

        dq = tl.dot(b_do, b_S, input_precision=PRECISION)
        da = tl.trans(tl.dot(tl.trans(b_S), dr, input_precision=PRECISION))
        db = tl.dot(b_u, now, input_precision=PRECISION)
        dk = tl.dot(b_v, now, input_precision=PRECISION)
        store_rows(d_decayed + at * K, dq, row, K, live, i, K, BLOCK_K)
        store_rows(d_decayed + size + at * K, da, row, K, live, i, K, BLOCK_K)
        store_rows(d_decayed + 2 * size + at * K, db, row, K, live, i, K, BLOCK_K)
        store_rows(d_decayed + 3 * size + at * K, dk, row, K, live, i, K, BLOCK_K)
        tl.store(across + tl.cast(chunk, tl.int64) * K + i, tl.sum(dS * b_S, 0) * total, mask=i < K)

        dS *= total[None, :]
        dS = tl.dot(tl.trans(b_do), b_q, dS, input_precision=PRECISION)
        dS = tl.dot(dr, b_a, dS, input_precision=PRECISION)
    if HAS_FIRST:
        tl.store(dfirst + state, dS, mask=inside)


@triton.jit
def load_sum(x, offset, mask, stride, PARTS: tl.constexpr):
    """The sum of the parts of x, in fp32."""
    total = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(x + part * stride + offset, mask=mask, other=0.0)
    return total


@triton.jit
def finish_kernel(
    q, k, a, b, g, d_decayed, d_scores, across, dq, dk, da, db, dg, T, H, heads,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, g_b, g_t, g_h, g_c,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, HALVINGS: tl.constexpr, PARTS: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, da, db, dk and dg from the parts that `backward_kernel` left; one program per chunk."""
    heads = tl.cast(heads, tl.int64)
    dtype = q.dtype.element_ty
    chunks = tl.cdiv(T, C)
    chunk = tl.cast(tl.program_id(0), tl.int64)
    head = chunk // chunks
    n, h = head // H, head % H
    at = chunk % chunks * C
    row = tl.arange(0, C)
    live = at + row < T
    i = tl.arange(0, BLOCK_K)
    b_q = load_rows(q + n * q_b + h * q_h + at * q_t, row, q_t, live, i, K, BLOCK_K)
    b_k = load_rows(k + n * k_b + h * k_h + at * k_t, row, k_t, live, i, K, BLOCK_K)
    b_a = load_rows(a + n * a_b + h * a_h + at * a_t, row, a_t, live, i, K, BLOCK_K)
    b_b = load_rows(b + n * b_b + h * b_h + at * b_t, row, b_t, live, i, K, BLOCK_K)
    b_g = load_decays(g + n * g_b + h * g_h + at * g_t, row, g_t, g_c, live, i, K)

    size = tl.cast(T, tl.int64) * K
    offset = head * 4 * size + (at + row)[:, None] * K + i[None, :]
    mask = live[:, None] & (i < K)[None, :]
    up_to = (row[None, :] <= row[:, None]).to(tl.float32)
    before = (row[None, :] < row[:, None]).to(tl.float32)
    after = (row[None, :] > row[:, None]).to(tl.float32)
    since = tl.exp2(tl.dot(up_to, b_g, input_precision=PRECISION))
    since_a = tl.exp2(tl.dot(before, b_g, input_precision=PRECISION))
    until = tl.exp2(tl.dot(after, b_g, input_precision=PRECISION))
    b_dq = load_sum(d_decayed, offset, mask, heads * 4 * size, PARTS) * since
    b_da = load_sum(d_decayed + size, offset, mask, heads * 4 * size, PARTS) * since_a
    b_db = load_sum(d_decayed + 2 * size, offset, mask, heads * 4 * size, PARTS) * until
    b_dk = load_sum(d_decayed + 3 * size, offset, mask, heads * 4 * size, PARTS) * until
    if DECAY_GRADIENT:
        whole = load_sum(across, chunk * K + i, i < K, heads * chunks * K, PARTS)
        from_on = (row[None, :] >= row[:, None]).to(tl.float32)
        b_dg = tl.dot(from_on, b_q * b_dq, input_precision=PRECISION) + whole[None, :]
        b_dg = tl.dot(after, b_a * b_da, b_dg, input_precision=PRECISION)
        b_dg = tl.dot(before, b_b * b_db + b_k * b_dk, b_dg, input_precision=PRECISION)

    square = chunk * 4 * C * C + row[:, None] * C + row[None, :]
    transposed = chunk * 4 * C * C + row[None, :] * C + row[:, None]
    each = (row < C)[:, None]
    stride = heads * chunks * 4 * C * C
    # Row s, column t; with a _t, row t, column s.
    dAb = load_sum(d_scores, square, each, stride, PARTS)
    dAk = load_sum(d_scores + C * C, square, each, stride, PARTS)
    dPb = load_sum(d_scores + 2 * C * C, square, each, stride, PARTS)
    dPk = load_sum(d_scores + 3 * C * C, square, each, stride, PARTS)
    dAb_t = load_sum(d_scores, transposed, each, stride, PARTS)
    dAk_t = load_sum(d_scores + C * C, transposed, each, stride, PARTS)
    dPb_t = load_sum(d_scores + 2 * C * C, transposed, each, stride, PARTS)
    dPk_t = load_sum(d_scores + 3 * C * C, transposed, each, stride, PARTS)
    diagonal = row[:, None] == row[None, :]
    now_b = tl.sum(tl.where(diagonal, dPb, 0.0), 1)[:, None]
    now_k = tl.sum(tl.where(diagonal, dPk, 0.0), 1)[:, None]
    b_dq += now_b * b_b + now_k * b_k
    b_db += now_b * b_q
    b_dk += now_k * b_q
    for doubling in tl.static_range(HALVINGS):
        kept = tl.exp2(tl.dot(to_middle(1 << doubling, C, False, False), b_g, input_precision=PRECISION))
        kept_a = tl.exp2(tl.dot(to_middle(1 << doubling, C, True, False), b_g, input_precision=PRECISION))
        far_q = (b_q * kept).to(dtype)
        far_a = (b_a * kept_a).to(dtype)
        near_b = (b_b * kept).to(dtype)
        near_k = (b_k * kept).to(dtype)
        part_q = tl.dot(last_pairs(dPb_t, 1 << doubling, C).to(dtype), near_b, input_precision=PRECISION)
        part_q = tl.dot(last_pairs(dPk_t, 1 << doubling, C).to(dtype), near_k, part_q, input_precision=PRECISION) * kept
        part_a = tl.dot(last_pairs(dAb_t, 1 << doubling, C).to(dtype), near_b, input_precision=PRECISION)
        part_a = (
            tl.dot(last_pairs(dAk_t, 1 << doubling, C).to(dtype), near_k, part_a, input_precision=PRECISION) * kept_a
        )
        part_b = tl.dot(pairs_of_halves(dPb, 1 << doubling, C).to(dtype), far_q, input_precision=PRECISION)
        part_b = (
            tl.dot(pairs_of_halves(dAb, 1 << doubling, C).to(dtype), far_a, part_b, input_precision=PRECISION) * kept
        )
        part_k = tl.dot(pairs_of_halves(dPk, 1 << doubling, C).to(dtype), far_q, input_precision=PRECISION)
        part_k = (
            tl.dot(pairs_of_halves(dAk, 1 << doubling, C).to(dtype), far_a, part_k, input_precision=PRECISION) * kept
        )
        b_dq += part_q
        b_da += part_a
        b_db += part_b
        b_dk += part_k
        if DECAY_GRADIENT:
            slopes = b_q * part_q + b_b * part_b + b_k * part_k
            b_dg = tl.dot(to_middle(1 << doubling, C, False, True), slopes, b_dg, input_precision=PRECISION)
            b_dg = tl.dot(to_middle(1 << doubling, C, True, True), b_a * part_a, b_dg, input_precision=PRECISION)
    out = (n * T * H + h + at * H) * K
    store_rows(dq + out, b_dq, row, H * K, live, i, K, BLOCK_K)
    store_rows(da + out, b_da, row, H * K, live, i, K, BLOCK_K)
    store_rows(db + out, b_db, row, H * K, live, i, K, BLOCK_K)
    store_rows(dk + out, b_dk, row, H * K, live, i, K, BLOCK_K)
    if DECAY_GRADIENT:
        store_rows(dg + out, b_dg, row, H * K, live, i, K, BLOCK_K)


@triton.jit
def last_pairs(x, h: tl.constexpr, C: tl.constexpr):
    """`pairs_of_halves` of the transpose: row in the last, column in the first half."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return tl.where(((i // h) % 2 == 1) & (i // h == j // h + 1), x, 0.0)
