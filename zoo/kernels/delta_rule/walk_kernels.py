"""The walks through the chunks of a sequence, all that has to be done one chunk after the other.

With S the state before a chunk, of both delta rules what they write, what they return and what they hand on is

    u = U + W S,   o = q S + P u [+ O],   S' = G S + b^T u [+ k^T v]

where G is what the decay leaves. W, U and P do not depend on the state: the `prepare_kernel` of either rule makes them
for all chunks at once. Back go

    du = b dS' + P^T do,   dr = X^T du,   dS = G dS' + q^T do + W^T du

and r = v - k S, or r = a S + A^k v, is what U + W S = X r is made of. The gradients of everything else follow from
these and the states on both sides of a chunk, so they are left to kernels that take all chunks at once.

States and steps are transposed, V by K and V by C: so the product that depends on the last one takes it from registers,
no column of v depends on another one, and Triton has no accumulators to transpose before a product, which 3.4 to 3.7
sometimes miscompile on Hopper.

CHANNELS: the generalised rule, with squares X, P^b, A^k, P^k, and q, b and k that have the decay inside the chunk in
them, from and to its borders, and totals (B, H, chunks, K) across it; BOUNDED: from and to its middle, and totals
(B, H, chunks, 2, K) of its two halves, and the states are those that decayed through the first half. Else the scalar
rule, with squares X, P, and b is k, to be scaled by writes (B, H, T); SCALED: q is to be scaled by reads (B, H, T).
Where there is a decay, totals (B, H, chunks) are log2 of what is left across a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.delta_rule.triangles import load_square
from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import load_rows


@triton.jit
def store_transposed(x, values, row, stride, live, column, size: tl.constexpr, block: tl.constexpr):
    """Rows and columns of x from `values` (columns, rows)."""
    mask = live[:, None]
    if size % block != 0:
        mask = mask & (column < size)[None, :]
    tl.store(x + row[:, None] * stride + column[None, :], tl.trans(values).to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_factors(
    reads, writes, totals, at, row, live, i,
    K: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, BOUNDED: tl.constexpr, DECAYS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Of the chunk at `at`, what multiplies q and b, by step, and the state: BOUNDED before and after, else in it."""
    read = 1.0
    write = 1.0
    first_half = 1.0
    total = 1.0
    if BOUNDED:
        totals += at // C * (2 * K) + i
        first_half = tl.load(totals, mask=i < K, other=0.0)[None, :]
        total = tl.load(totals + K, mask=i < K, other=0.0)[None, :]
    elif CHANNELS:
        total = tl.load(totals + at // C * K + i, mask=i < K, other=0.0)[None, :]
    else:
        write = tl.load(writes + at + row, mask=live, other=0.0)
        if SCALED:
            read = tl.load(reads + at + row, mask=live, other=0.0)
        if DECAYS:
            total = tl.exp2(tl.load(totals + at // C))
    return read, write, first_half, total


@kernel
def forward_kernel(
    q, b, k, v, W, U, squares, reads, writes, totals, first, o, u, states, last, T, H,
    q_n, q_t, q_h, b_n, b_t, b_h, k_n, k_t, k_h, v_n, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_V: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, CHANNELS: tl.constexpr, BOUNDED: tl.constexpr, DECAYS: tl.constexpr,
    SCALED: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o (B, T, H, V); with KEEP u (B, H, T, V) and the states before the chunks (B, H, chunks, V, K), padded with
    zeros. One program per sequence, head and BLOCK columns of v."""
    wait_for_earlier()
    dtype = q.dtype.element_ty
    blocks: tl.constexpr = PADDED_V // BLOCK
    squares_each: tl.constexpr = 4 if CHANNELS else 2
    block = tl.program_id(0) % blocks
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    n, h = head // H, head % H
    chunks = tl.cdiv(T, C)
    q += n * q_n + h * q_h
    b += n * b_n + h * b_h
    W += head * T * K
    U += head * T * V
    u += head * T * V
    o += (n * T * H + h) * V
    squares += head * chunks * (squares_each * C * C)
    totals += head * chunks * (2 * K if BOUNDED else (K if CHANNELS else 1))
    reads += head * T
    writes += head * T
    if CHANNELS:
        k += n * k_n + h * k_h
        v += n * v_n + h * v_h
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = block * BLOCK + tl.arange(0, BLOCK)
    inside = (j < V)[:, None] & (i < K)[None, :]
    state = head * K * V + i[None, :] * V + j[:, None]
    states += (head * chunks * PADDED_V + j[:, None]) * BLOCK_K + i[None, :]
    if HAS_FIRST:
        S = tl.load(first + state, mask=inside, other=0.0)
    else:
        S = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for chunk in range(chunks):
        at = tl.cast(chunk, tl.int64) * C
        live = at + row < T
        # Small loads come first: what is loaded behind a barrier is waited for.
        read, write, first_half, total = load_factors(
            reads, writes, totals, at, row, live, i, K, C, CHANNELS, BOUNDED, DECAYS, SCALED
        )
        if BOUNDED:
            S *= first_half
        now = S.to(dtype)
        if KEEP:
            tl.store(states + at // C * (PADDED_V * BLOCK_K), now)
        b_W = load_rows(W + at * K, row, K, live, i, K, BLOCK_K)
        b_U = load_rows(U + at * V, row, V, live, j, V, PADDED_V)
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_b = load_rows(b + at * b_t, row, b_t, live, i, K, BLOCK_K)
        b_P = load_square(squares + at * (squares_each * C) + C * C, C)
        b_u = tl.dot(now, tl.trans(b_W), tl.trans(b_U).to(tl.float32), input_precision=PRECISION)
        b_o = tl.dot(now, tl.trans(b_q), input_precision=PRECISION)
        if SCALED:
            b_o *= read[None, :]
        b_o = tl.dot(b_u.to(dtype), tl.trans(b_P), b_o, input_precision=PRECISION)
        if CHANNELS:
            b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
            b_v = load_rows(v + at * v_t, row, v_t, live, j, V, PADDED_V)
            b_Pk = load_square(squares + at * (squares_each * C) + 3 * C * C, C)
            b_o = tl.dot(tl.trans(b_v), tl.trans(b_Pk), b_o, input_precision=PRECISION)
        if DECAYS and not BOUNDED:
            S *= total
        if CHANNELS:
            S = tl.dot(tl.trans(b_v), b_k, S, input_precision=PRECISION)
        store_transposed(o + at * H * V, b_o, row, H * V, live, j, V, PADDED_V)
        if KEEP:
            store_transposed(u + at * V, b_u, row, V, live, j, V, PADDED_V)
        if not CHANNELS:
            b_u *= write[None, :]
        S = tl.dot(b_u.to(dtype), b_b, S, input_precision=PRECISION)
        if BOUNDED:
            S *= total
    if HAS_LAST:
        tl.store(last + state, S, mask=inside)


@kernel
def backward_kernel(
    q, b, W, squares, reads, writes, totals, do, dlast, dr, dstates, dfirst, T, H,
    q_n, q_t, q_h, b_n, b_t, b_h, do_n, do_t, do_h, dr_n, dr_t, dr_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_V: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, CHANNELS: tl.constexpr, BOUNDED: tl.constexpr, DECAYS: tl.constexpr,
    SCALED: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dr, and the gradients of the states after the chunks, laid out like `states` of the walk forward."""
    wait_for_earlier()
    dtype = q.dtype.element_ty
    blocks: tl.constexpr = PADDED_V // BLOCK
    squares_each: tl.constexpr = 4 if CHANNELS else 2
    block = tl.program_id(0) % blocks
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    n, h = head // H, head % H
    chunks = tl.cdiv(T, C)
    q += n * q_n + h * q_h
    b += n * b_n + h * b_h
    do += n * do_n + h * do_h
    dr += n * dr_n + h * dr_h
    W += head * T * K
    squares += head * chunks * (squares_each * C * C)
    totals += head * chunks * (2 * K if BOUNDED else (K if CHANNELS else 1))
    reads += head * T
    writes += head * T
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = block * BLOCK + tl.arange(0, BLOCK)
    inside = (j < V)[:, None] & (i < K)[None, :]
    state = head * K * V + i[None, :] * V + j[:, None]
    dstates += (head * chunks * PADDED_V + j[:, None]) * BLOCK_K + i[None, :]
    if HAS_LAST:
        dS = tl.load(dlast + state, mask=inside, other=0.0)
    else:
        dS = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        at = tl.cast(chunk, tl.int64) * C
        live = at + row < T
        read, write, first_half, total = load_factors(
            reads, writes, totals, at, row, live, i, K, C, CHANNELS, BOUNDED, DECAYS, SCALED
        )
        if BOUNDED:
            dS *= total
        now = dS.to(dtype)
        tl.store(dstates + at // C * (PADDED_V * BLOCK_K), now)
        b_b = load_rows(b + at * b_t, row, b_t, live, i, K, BLOCK_K)
        b_do = load_rows(do + at * do_t, row, do_t, live, j, V, PADDED_V)
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_W = load_rows(W + at * K, row, K, live, i, K, BLOCK_K)
        b_X = load_square(squares + at * (squares_each * C), C)
        b_P = load_square(squares + at * (squares_each * C) + C * C, C)
        du = tl.dot(now, tl.trans(b_b), input_precision=PRECISION)
        if not CHANNELS:
            du *= write[None, :]
        du = tl.dot(tl.trans(b_do), b_P, du, input_precision=PRECISION).to(dtype)
        b_dr = tl.dot(du, b_X, input_precision=PRECISION)
        store_transposed(dr + at * dr_t, b_dr, row, dr_t, live, j, V, PADDED_V)
        if DECAYS and not BOUNDED:
            dS *= total
        if SCALED:
            b_do = (b_do * read[:, None]).to(dtype)
        dS = tl.dot(tl.trans(b_do), b_q, dS, input_precision=PRECISION)
        dS = tl.dot(du, b_W, dS, input_precision=PRECISION)
        if BOUNDED:
            dS *= first_half
    if HAS_FIRST:
        tl.store(dfirst + state, dS, mask=inside)
