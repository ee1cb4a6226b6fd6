"""The recurrence where every key channel has its own decay, with or without a bonus for the current token.

Time is cut into chunks of C steps. With the log decays summed from the chunk's start, since_t = g_1 + ... + g_t and
until_s = g_{s+1} + ... + g_C,

    o = scores v + (q e^since) S        S <- diag(e^{g_1 + ... + g_C}) S + (k e^until)^T v

so `prepare_kernel` makes the scores and the two products for every chunk on its own, and `scan_kernel` carries the
state through them. dv and the gradient D of the state are the same scan backwards with the two products exchanged
and the scores transposed. `gradient_kernel` then takes each chunk on its own again: S before it and D behind it hold
all that it needs from the others. Backwards through the decays, dg_u adds up, over all pairs s < u <= t in the chunk,
their slope; over t >= u, what t reads from S; over s < u, what s writes to D; and e^{g_1 + ... + g_C} S.D.

The decay a(t, s) = exp(g_{s+1} + ... + g_t) inside a chunk must be split into a factor of t and one of s. In an aligned
block of 2h steps the first h reach the last h through its middle: a(t, s) = a(t, middle) a(middle, s), two factors
below 1, and one array holds those of both halves. Halving h from C/2 to 4 leaves the pairs within blocks of 4 steps.
There the two factors are taken from the start of the block, and one may be as large as e^80, but not more, because no
step counts for less than e^-20 (what that keeps is below the rounding of an fp32 state). So no bit of an output depends
on a later decay. A gradient may: `gradient_kernel` stops at blocks of 8, with both factors through their middle, in the
same range. Sums of decays, and of slopes, over neighbouring steps are products with matrices of 0 and 1, so nothing
small is ever a difference of large sums.

With a bonus the output reads the state before its own step: the decay of step t is left out of a(t, s).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import LOG2E, load_rows, store_rows

# Just past e^-20; four of them are within the range of fp32 and bf16.
LEAST = tl.constexpr(-29.0)


@triton.jit
def log_decays(g, row, g_t, g_c, live, column, size: tl.constexpr):
    pointers = g + row[:, None] * g_t + column[None, :] * g_c
    b_g = tl.load(pointers, mask=live[:, None] & (column < size)[None, :], other=0.0)
    return tl.maximum(b_g.to(tl.float32) * LOG2E, LEAST)


@triton.jit
def to_middle(i, j, h, BONUS: tl.constexpr):
    """Whether the decay of step j is between step i and the middle of i's block of 2h; i: a column, j: a row."""
    since_middle = j < i if BONUS else j <= i
    return ((i ^ j) < h) & (((i & h) != 0) & since_middle | ((i & h) == 0) & (j > i))


@triton.jit
def paired(i, j, h, size: tl.constexpr):
    """Whether steps i and j are in different halves of the same block of 2h."""
    return ((i ^ j) & (size - h)) == h


@triton.jit
def from_start(i, j, BONUS: tl.constexpr):
    """Whether the decay of step j is between the start of i's block of 4 and step i."""
    return ((i ^ j) < 4) & (j < i if BONUS else j <= i)


@triton.jit
def from_middle(i, j, BONUS: tl.constexpr):
    """1 where step j is between the middle of i's block of 8 and i, -1 where i is the earlier, else 0."""
    passed = j < i if BONUS else j <= i
    sign = tl.where((j & 4) != 0, tl.where(passed, 1.0, 0.0), tl.where(passed, 0.0, -1.0))
    return tl.where((i ^ j) < 8, sign, 0.0)


@kernel
def prepare_kernel(
    q, k, g, u, read_q, written_k, scores, whole, T, H, group,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, g_c, u_b, u_h,
    K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, HALVINGS: tl.constexpr, BONUS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and chunk: q e^since, k e^until, the scores, and log2 of the whole decay."""
    wait_for_earlier()
    chunks = tl.cdiv(T, C)
    part = tl.cast(tl.program_id(0), tl.int64)
    head, at = part // chunks, part % chunks * C
    b, h = head // H, head % H
    q += b * q_b + h * q_h + at * q_t
    k += b * k_b + h * k_h + at * k_t
    g += b * g_b + h * g_h + at * g_t
    u += b // group * u_b + h * u_h
    read_q += ((b * T + at) * H + h) * K
    written_k += ((b * T + at) * H + h) * K
    dtype = q.dtype.element_ty
    # fp16 holds a log decay to 2^-12 of itself, which 16-bit operands do not notice.
    sum_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    # Factors of up to e^80 are out of its range.
    near_dtype: tl.constexpr = tl.float32 if dtype == tl.float16 else dtype
    row = tl.arange(0, C)
    t = row[:, None]
    s = row[None, :]
    live = at + row < T
    b_scores = tl.zeros((C, C), tl.float32)
    for block in range((K + BLOCK - 1) // BLOCK):
        column = block * BLOCK + tl.arange(0, BLOCK)
        b_q = load_rows(q, row, q_t, live, column, K, BLOCK)
        b_k = load_rows(k, row, k_t, live, column, K, BLOCK)
        b_g = log_decays(g, row, g_t, g_c, live, column, K)
        tl.store(whole + part * K + column, tl.sum(b_g, 0), mask=column < K)
        b_g = b_g.to(sum_dtype)
        kept = tl.exp2(tl.dot((s < t if BONUS else s <= t).to(sum_dtype), b_g, input_precision=PRECISION))
        store_rows(read_q, b_q * kept, row, H * K, live, column, K, BLOCK)
        kept = tl.exp2(tl.dot((s > t).to(sum_dtype), b_g, input_precision=PRECISION))
        store_rows(written_k, b_k * kept, row, H * K, live, column, K, BLOCK)

        kept = tl.dot(from_start(t, s, BONUS).to(sum_dtype), b_g, input_precision=PRECISION)
        far = (b_q * tl.exp2(kept)).to(near_dtype)
        if BONUS:
            kept = tl.dot(from_start(t, s, False).to(sum_dtype), b_g, input_precision=PRECISION)
        near = (b_k * tl.exp2(-kept)).to(near_dtype)
        pairs = tl.dot(far, tl.trans(near), input_precision=PRECISION)
        b_scores += tl.where(((t ^ s) < 4) & (s < t if BONUS else s <= t), pairs, 0.0)
        for halving in tl.static_range(HALVINGS):
            half = 4 << halving
            kept = tl.exp2(tl.dot(to_middle(t, s, half, BONUS).to(sum_dtype), b_g, input_precision=PRECISION))
            mixed = (tl.where((t & half) != 0, b_q, b_k) * kept).to(dtype)
            pairs = tl.dot(mixed, tl.trans(mixed), input_precision=PRECISION)
            b_scores += tl.where(paired(t, s, half, C) & (t > s), pairs, 0.0)
        if BONUS:
            b_u = tl.load(u + column, mask=column < K, other=0.0).to(tl.float32)
            b_scores += tl.where(t == s, tl.sum(b_q.to(tl.float32) * b_k * b_u[None, :], 1)[:, None], 0.0)
    tl.store(scores + (part * C + t) * C + s, b_scores.to(dtype))


@kernel
def scan_kernel(
    read, written, z, scores, whole, first, out, states, last, T, H, z_b, z_t, z_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scores z + read S, S <- diag(2^whole) S + written^T z, by chunks; REVERSE: backwards, scores transposed.

    One program per sequence, head and BLOCK columns of z. SAVE keeps the state that each chunk reads.
    """
    wait_for_earlier()
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    column = tl.program_id(0) % blocks * BLOCK
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    tokens = b * T * H + h
    read += tokens * K
    written += tokens * K
    out += tokens * V
    z += b * z_b + h * z_h
    dtype = read.dtype.element_ty
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = column + tl.arange(0, BLOCK)
    inside = (i < K)[:, None] & (j < V)[None, :]
    state = i[:, None] * V + j[None, :]
    if HAS_FIRST:
        S = tl.load(first + head * K * V + state, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    chunks = tl.cdiv(T, C)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        part = head * chunks + chunk
        at = tl.cast(chunk * C, tl.int64)
        live = chunk * C + row < T
        b_read = load_rows(read + at * H * K, row, H * K, live, i, K, BLOCK_K)
        b_written = load_rows(written + at * H * K, row, H * K, live, i, K, BLOCK_K)
        b_z = load_rows(z + at * z_t, row, z_t, live, j, V, BLOCK)
        b_scores = tl.load(scores + (part * C + row[:, None]) * C + row[None, :])
        kept = tl.exp2(tl.load(whole + part * K + i, mask=i < K, other=0.0))
        S_read = S.to(dtype)
        if SAVE:
            tl.store(states + part * K * V + state, S_read, mask=inside)
        b_out = tl.dot(b_read, S_read, input_precision=PRECISION)
        if REVERSE:
            b_scores = tl.trans(b_scores)
        b_out = tl.dot(b_scores, b_z, b_out, input_precision=PRECISION)
        store_rows(out + at * H * V, b_out, row, H * V, live, j, V, BLOCK)
        S = tl.dot(tl.trans(b_written), b_z, S * kept[:, None], input_precision=PRECISION)
    if HAS_LAST:
        tl.store(last + head * K * V + state, S, mask=inside)


@kernel
def gradient_kernel(
    q, k, v, g, u, do, S, D, dq, dk, dg, du, T, H, group,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, g_c, u_b, u_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    HALVINGS: tl.constexpr, BONUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head, chunk and BLOCK channels of dq, dk and dg. du: a part per chunk."""
    wait_for_earlier()
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    chunks = tl.cdiv(T, C)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    part = tl.cast(tl.program_id(0) // blocks, tl.int64)
    head, at = part // chunks, part % chunks * C
    b, h = head // H, head % H
    tokens = ((b * T + at) * H + h) * K
    dtype = q.dtype.element_ty
    sum_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    # Slopes have no bound, and near factors reach e^80: both need the range of fp32.
    wide_dtype: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
    row = tl.arange(0, C)
    t = row[:, None]
    s = row[None, :]
    live = at + row < T
    b_q = load_rows(q + b * q_b + h * q_h + at * q_t, row, q_t, live, column, K, BLOCK)
    b_k = load_rows(k + b * k_b + h * k_h + at * k_t, row, k_t, live, column, K, BLOCK)
    b_g = log_decays(g + b * g_b + h * g_h + at * g_t, row, g_t, g_c, live, column, K)
    v += b * v_b + h * v_h + at * v_t
    do += b * do_b + h * do_h + at * do_t
    # The slope of a pair's score stands at (t, s) and at (s, t).
    slopes = tl.zeros((C, C), tl.float32)
    transposed = tl.zeros((C, C), tl.float32)
    b_dq = tl.zeros((C, BLOCK), tl.float32)
    b_dk = tl.zeros((C, BLOCK), tl.float32)
    over = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK_V):
        j = first + tl.arange(0, BLOCK_V)
        b_v = load_rows(v, row, v_t, live, j, V, BLOCK_V)
        b_do = load_rows(do, row, do_t, live, j, V, BLOCK_V)
        state = part * K * V + column[:, None] * V + j[None, :]
        inside = (column < K)[:, None] & (j < V)[None, :]
        b_S = tl.load(S + state, mask=inside, other=0.0)
        b_D = tl.load(D + state, mask=inside, other=0.0)
        over += tl.sum(b_S.to(tl.float32) * b_D, 1)
        b_dq = tl.dot(b_do, tl.trans(b_S), b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_v, tl.trans(b_D), b_dk, input_precision=PRECISION)
        slopes = tl.dot(b_do, tl.trans(b_v), slopes, input_precision=PRECISION)
        transposed = tl.dot(b_v, tl.trans(b_do), transposed, input_precision=PRECISION)
    now = tl.sum(tl.where(t == s, slopes, 0.0), 1)[:, None]
    slopes = tl.where(t > s, slopes, transposed)
    over *= tl.exp2(tl.sum(b_g, 0))
    b_g = b_g.to(sum_dtype)
    # What reads S, and all in last halves, counts for the decays up to its own step; what is written to D, and all in
    # first halves, for those behind it.
    kept = tl.exp2(tl.dot((s < t if BONUS else s <= t).to(sum_dtype), b_g, input_precision=PRECISION))
    b_dq *= kept
    counts = (s > t if BONUS else s >= t).to(wide_dtype)
    b_dg = tl.dot(counts, (b_q * b_dq).to(wide_dtype), input_precision=PRECISION) + over[None, :]
    kept = tl.exp2(tl.dot((s > t).to(sum_dtype), b_g, input_precision=PRECISION))
    b_dk *= kept
    b_dg = tl.dot((s < t).to(wide_dtype), (b_k * b_dk).to(wide_dtype), b_dg, input_precision=PRECISION)

    kept = tl.dot(from_middle(t, s, BONUS).to(sum_dtype), b_g, input_precision=PRECISION)
    far_kept = tl.exp2(kept)
    if BONUS:
        kept = tl.dot(from_middle(t, s, False).to(sum_dtype), b_g, input_precision=PRECISION)
    near_kept = tl.exp2(-kept)
    far = b_q * far_kept
    near = b_k * near_kept
    gap: tl.constexpr = 1 if BONUS else 0
    close = tl.where(((t ^ s) < 8) & (t > s + gap), slopes, 0.0).to(wide_dtype)
    d_far = tl.dot(close, near.to(wide_dtype), input_precision=PRECISION)
    close = tl.where(((t ^ s) < 8) & (s > t + gap), slopes, 0.0).to(wide_dtype)
    d_near = tl.dot(close, far.to(wide_dtype), input_precision=PRECISION)
    b_dq += d_far * far_kept
    b_dk += d_near * near_kept
    behind = ((t ^ s) < 8) & (s >= t)
    if BONUS:
        # No decay is between neighbours, and above they would leave a difference of rounded slopes in dg.
        close = tl.where(((t ^ s) < 8) & (t == s + 1), slopes, 0.0).to(dtype)
        b_dq = tl.dot(close, b_k, b_dq, input_precision=PRECISION)
        close = tl.where(((t ^ s) < 8) & (s == t + 1), slopes, 0.0).to(dtype)
        b_dk = tl.dot(close, b_q, b_dk, input_precision=PRECISION)
        b_dg = tl.dot((behind & (s > t)).to(wide_dtype), (far * d_far).to(wide_dtype), b_dg, input_precision=PRECISION)
        b_dg -= tl.dot(behind.to(wide_dtype), (near * d_near).to(wide_dtype), input_precision=PRECISION)
    else:
        through = (far * d_far - near * d_near).to(wide_dtype)
        b_dg = tl.dot(behind.to(wide_dtype), through, b_dg, input_precision=PRECISION)

    for halving in range(HALVINGS):
        half = 8 << halving
        kept = tl.exp2(tl.dot(to_middle(t, s, half, BONUS).to(sum_dtype), b_g, input_precision=PRECISION))
        mixed = tl.where((t & half) != 0, b_q, b_k) * kept
        other = tl.where(paired(t, s, half, C), slopes, 0.0).to(dtype)
        d_mixed = tl.dot(other, mixed.to(dtype), input_precision=PRECISION)
        counts = to_middle(s, t, half, BONUS).to(wide_dtype)
        b_dg = tl.dot(counts, (mixed * d_mixed).to(wide_dtype), b_dg, input_precision=PRECISION)
        d_mixed *= kept
        b_dq += tl.where((t & half) != 0, d_mixed, 0.0)
        b_dk += tl.where((t & half) != 0, 0.0, d_mixed)

    if BONUS:
        b_u = tl.load(u + b // group * u_b + h * u_h + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
        own = ((b // group * H + h) * group + b % group) * chunks + part % chunks
        tl.store(du + own * K + column, tl.sum(now * b_q * b_k, 0), mask=column < K)
        now = now * b_u
    store_rows(dq + tokens, b_dq + now * b_k, row, H * K, live, column, K, BLOCK)
    store_rows(dk + tokens, b_dk + now * b_q, row, H * K, live, column, K, BLOCK)
    store_rows(dg + tokens, b_dg, row, H * K, live, column, K, BLOCK)
