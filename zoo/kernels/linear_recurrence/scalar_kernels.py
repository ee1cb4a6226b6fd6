"""The recurrence where the channels of a head share their decay, or where nothing decays.

Time is cut into chunks of C steps, and a program walks them with the state in registers. With the log decays of a
chunk summed up to and behind each step, since_t = g_1 + ... + g_t and until_s = g_{s+1} + ... + g_C, its pairs decay by
a(t, s) = e^{since_t - since_s}, what it reads of the state S before it by e^{since_t}, and what it writes to the state
behind it by e^{until_s}:

    o_t  = e^{since_t} S^T q_t  + sum_{s<=t} a(t, s) (q_t.k_s) v_s
    dq_t = e^{since_t} S do_t   + sum_{s<=t} a(t, s) (do_t.v_s) k_s
    dk_s = e^{until_s} D v_s    + sum_{t>=s} a(t, s) (do_t.v_s) q_t
    dv_s = e^{until_s} D^T k_s  + sum_{t>=s} a(t, s) (q_t.k_s) do_t

D is the gradient of the state behind the chunk. The forward pass keeps each S, so that one walk back, which carries D,
has all that the gradients need: `backward_kernel`. That of g_u adds up what goes over step u: pairs s < u <= t of the
chunk, reads of S at t >= u, writes to D at s < u, and S.D e^{g_1 + ... + g_C}. A walk with all of this runs out of
registers, so with it `forward_kernel` only carries D back, for dv, and `gradient_kernel` takes each chunk on its own.
The sums are of fp32 products, and none is a difference of much larger ones: a decay of e^-20 has an exact gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import LOG2E, load_rows, store_rows

NO_DECAY = tl.constexpr(0)
PER_HEAD = tl.constexpr(1)
PER_STEP = tl.constexpr(2)


@triton.jit
def load_decay(g, row, stride, live, rows: tl.constexpr):
    """Log2 decays of steps; 0 where not live or outside the chunk of `rows`."""
    mask = live & (row >= 0) & (row < rows)
    return tl.load(g + row * stride, mask=mask, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def sums_of_decay(g, stride, left, C: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr):
    """since (C,), until (C,) and the whole decay of a chunk with `left` steps; what is behind them does not decay."""
    row = tl.arange(0, C)
    if DECAY == PER_HEAD:
        g_head = tl.load(g).to(tl.float32) * LOG2E
        count = tl.minimum(left, C)
        passed = tl.minimum(row + 1, count)
        since = g_head * passed
        until = g_head * (count - passed)
        whole = g_head * count
    else:
        since = tl.cumsum(load_decay(g, row, stride, row < left, C), 0)
        whole = tl.min(since, 0)
        if EXACT:
            # A difference of sums would keep only the absolute error of the larger one.
            until = tl.cumsum(load_decay(g, row + 1, stride, row + 1 < left, C), 0, reverse=True)
        else:
            until = whole - since
    return since, until, whole


@triton.jit
def decay_of_pairs(
    g, stride, left, since, C: tl.constexpr, DECAY: tl.constexpr, ROWS_LATER: tl.constexpr, EXACT: tl.constexpr
):
    """a (C, C), 0 where s > t. ROWS_LATER: a row is a t and a column an s; else the other way round."""
    row = tl.arange(0, C)
    i = row[:, None]
    j = row[None, :]
    if DECAY == PER_HEAD:
        between = (i - j if ROWS_LATER else j - i) * (tl.load(g).to(tl.float32) * LOG2E)
    elif EXACT:
        b_g = load_decay(g, row, stride, row < left, C)
        if ROWS_LATER:
            terms = tl.where(i > j, b_g[:, None], 0.0)
            between = tl.dot((j <= i).to(tl.float32), terms, input_precision="tf32x3")
        else:
            terms = tl.where(i < j, b_g[None, :], 0.0)
            between = tl.dot(terms, (i <= j).to(tl.float32), input_precision="tf32x3")
    elif ROWS_LATER:
        between = since[:, None] - since[None, :]
    else:
        between = since[None, :] - since[:, None]
    return tl.exp2(tl.where(i >= j if ROWS_LATER else i <= j, between, float("-inf")))


@triton.jit
def forward_kernel(
    q, k, v, g, first, o, states, last, T, H, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and BLOCK columns of v. SAVE keeps the state that each chunk reads.

    REVERSE: backwards from the last chunk, with q and k exchanged and do for v: o is dv, the states are each D.
    """
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    g += b * g_b + h * g_h
    o += (b * T * H + h) * V
    dtype = q.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    row = tl.arange(0, C)
    related = row[:, None] <= row[None, :] if REVERSE else row[:, None] >= row[None, :]
    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (i < K)[:, None] & (j < V)[None, :]
    state = i[:, None] * V + j[None, :]
    chunks = tl.cdiv(T, C)
    states += head * chunks * K * V
    if HAS_FIRST:
        S = tl.load(first + head * K * V + state, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        at = tl.cast(chunk * C, tl.int64)
        live = chunk * C + row < T
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK)
        read = S.to(dtype)
        if SAVE:
            # Zeros are neither kept nor loaded.
            held = (i < tl.minimum(step + HAS_FIRST, 1) * K)[:, None] & (j < V)[None, :]
            tl.store(states + chunk * K * V + state, read, mask=held)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_o = tl.dot(b_q, read, input_precision=PRECISION)
        if DECAY == NO_DECAY:
            scores = tl.where(related, scores, 0.0)
        else:
            b_g = g + at * g_t
            since, until, whole = sums_of_decay(b_g, g_t, T - chunk * C, C, DECAY, EXACT)
            scores *= decay_of_pairs(b_g, g_t, T - chunk * C, since, C, DECAY, not REVERSE, EXACT)
            b_o *= tl.exp2(until if REVERSE else since)[:, None]
        b_o = tl.dot(scores.to(dtype), b_v, b_o, input_precision=PRECISION)
        store_rows(o + at * H * V, b_o, row, H * V, live, j, V, BLOCK)
        if DECAY != NO_DECAY:
            b_v = (b_v * tl.exp2(since if REVERSE else until)[:, None]).to(dtype)
            S *= tl.exp2(whole)
        S = tl.dot(tl.trans(b_k), b_v, S, input_precision=PRECISION)
    if HAS_LAST:
        tl.store(last + head * K * V + state, S, mask=inside)


@triton.jit
def backward_kernel(
    q, k, v, g, states, do, dlast, dq, dk, dv, dfirst, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence and head: all gradients but that of the decay."""
    head = tl.cast(tl.program_id(0), tl.int64)
    b, h = head // H, head % H
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    g += b * g_b + h * g_h
    do += b * do_b + h * do_h
    tokens = b * T * H + h
    dq += tokens * K
    dk += tokens * K
    dv += tokens * V
    dtype = q.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    row = tl.arange(0, C)
    causal = row[:, None] >= row[None, :]
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    inside = (i < K)[:, None] & (j < V)[None, :]
    state = i[:, None] * V + j[None, :]
    chunks = tl.cdiv(T, C)
    states += head * chunks * K * V
    if HAS_LAST:
        D = tl.load(dlast + head * K * V + state, mask=inside, other=0.0).to(tl.float32)
    else:
        D = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step
        at = tl.cast(chunk * C, tl.int64)
        live = chunk * C + row < T
        b_q = load_rows(q + at * q_t, row, q_t, live, i, K, BLOCK_K)
        b_k = load_rows(k + at * k_t, row, k_t, live, i, K, BLOCK_K)
        b_v = load_rows(v + at * v_t, row, v_t, live, j, V, BLOCK_V)
        b_do = load_rows(do + at * do_t, row, do_t, live, j, V, BLOCK_V)
        held = (i < tl.minimum(chunk + HAS_FIRST, 1) * K)[:, None] & (j < V)[None, :]
        b_S = tl.load(states + chunk * K * V + state, mask=held, other=0.0)
        written = D.to(dtype)
        if DECAY == NO_DECAY:
            a = row[:, None] <= row[None, :]
        else:
            b_g = g + at * g_t
            left = T - chunk * C
            since, until, whole = sums_of_decay(b_g, g_t, left, C, DECAY, EXACT)
            a = decay_of_pairs(b_g, g_t, left, since, C, DECAY, False, EXACT)

        # A row of these is an s and a column a t.
        scores = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        scores = tl.where(a, scores, 0.0) if DECAY == NO_DECAY else scores * a
        b_dv = tl.dot(b_k, written, input_precision=PRECISION)
        if DECAY != NO_DECAY:
            b_dv *= tl.exp2(until)[:, None]
        b_dv = tl.dot(scores.to(dtype), b_do, b_dv, input_precision=PRECISION)
        store_rows(dv + at * H * V, b_dv, row, H * V, live, j, V, BLOCK_V)

        slopes = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        slopes = tl.where(a, slopes, 0.0) if DECAY == NO_DECAY else slopes * a
        b_dk = tl.dot(b_v, tl.trans(written), input_precision=PRECISION)
        if DECAY != NO_DECAY:
            b_dk *= tl.exp2(until)[:, None]
        b_dk = tl.dot(slopes.to(dtype), b_q, b_dk, input_precision=PRECISION)
        store_rows(dk + at * H * K, b_dk, row, H * K, live, i, K, BLOCK_K)

        slopes = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if DECAY == NO_DECAY:
            slopes = tl.where(causal, slopes, 0.0)
        else:
            slopes *= decay_of_pairs(b_g, g_t, left, since, C, DECAY, True, EXACT)
        b_dq = tl.dot(b_do, tl.trans(b_S), input_precision=PRECISION)
        if DECAY != NO_DECAY:
            b_dq *= tl.exp2(since)[:, None]
        b_dq = tl.dot(slopes.to(dtype), b_k, b_dq, input_precision=PRECISION)
        store_rows(dq + at * H * K, b_dq, row, H * K, live, i, K, BLOCK_K)

        if DECAY != NO_DECAY:
            b_q = (b_q * tl.exp2(since)[:, None]).to(dtype)
            D *= tl.exp2(whole)
        D = tl.dot(tl.trans(b_q), b_do, D, input_precision=PRECISION)
    if HAS_FIRST:
        tl.store(dfirst + head * K * V + state, D, mask=inside)


@triton.jit
def gradient_kernel(
    q, k, v, g, do, S, D, dq, dk, dg, T, H, tokens,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DECAY_GRADIENT: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head, chunk and BLOCK columns of dq and dk, with its part of dg; `tokens` in a part."""
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % blocks
    chunks = tl.cdiv(T, C)
    part = tl.cast(tl.program_id(0) // blocks, tl.int64)
    head, chunk = part // chunks, part % chunks
    b, h = head // H, head % H
    at = chunk * C
    own = (b * T + at) * H + h
    q += b * q_b + h * q_h + at * q_t
    k += b * k_b + h * k_h + at * k_t
    v += b * v_b + h * v_h + at * v_t
    g += b * g_b + h * g_h + at * g_t
    do += b * do_b + h * do_h + at * do_t
    dtype = q.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    row = tl.arange(0, C)
    live = at + row < T
    i = block * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK_V)
    state = part * K * V + i[:, None] * V + j[None, :]
    if DECAY != NO_DECAY:
        since, until, whole = sums_of_decay(g, g_t, T - at, C, DECAY, EXACT)

    b_do = load_rows(do, row, do_t, live, j, V, BLOCK_V)
    b_v = load_rows(v, row, v_t, live, j, V, BLOCK_V)
    b_k = load_rows(k, row, k_t, live, i, K, BLOCK)
    b_q = load_rows(q, row, q_t, live, i, K, BLOCK)
    b_S = tl.load(S + state, mask=(i < tl.minimum(chunk + HAS_FIRST, 1) * K)[:, None] & (j < V)[None, :], other=0.0)
    b_dq = tl.dot(b_do, tl.trans(b_S), input_precision=PRECISION)
    slopes = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if DECAY == NO_DECAY:
        slopes = tl.where(row[:, None] >= row[None, :], slopes, 0.0)
    else:
        b_dq *= tl.exp2(since)[:, None]
        slopes *= decay_of_pairs(g, g_t, T - at, since, C, DECAY, True, EXACT)
    if DECAY_GRADIENT:
        reads = tl.sum(b_q * b_dq, 1)
    b_dq = tl.dot(slopes.to(dtype), b_k, b_dq, input_precision=PRECISION)
    store_rows(dq + own * K, b_dq, row, H * K, live, i, K, BLOCK)

    held = (i < tl.minimum(chunks - 1 - chunk + HAS_LAST, 1) * K)[:, None] & (j < V)[None, :]
    b_D = tl.load(D + state, mask=held, other=0.0)
    b_dk = tl.dot(b_v, tl.trans(b_D), input_precision=PRECISION)
    # A row of these is an s and a column a t.
    slopes = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    if DECAY == NO_DECAY:
        slopes = tl.where(row[:, None] <= row[None, :], slopes, 0.0)
    else:
        b_dk *= tl.exp2(until)[:, None]
        slopes *= decay_of_pairs(g, g_t, T - at, since, C, DECAY, False, EXACT)
    if DECAY_GRADIENT:
        later = row[None, :] > row[:, None]
        writes = tl.sum(b_k * b_dk, 1)
        pairs = tl.where(later, slopes * tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION), 0.0)
        reads += tl.sum(pairs, 0) - tl.sum(pairs, 1)
        b_dg = tl.exp2(whole) * tl.sum(b_S.to(tl.float32) * b_D)
        b_dg += tl.sum(tl.where(later, writes[:, None], reads[:, None]), 0)
        tl.store(dg + block * tokens + own + row * H, b_dg, mask=live)
    b_dk = tl.dot(slopes.to(dtype), b_q, b_dk, input_precision=PRECISION)
    store_rows(dk + own * K, b_dk, row, H * K, live, i, K, BLOCK)
