"""The recurrence where the channels of a head share their decay, or where nothing decays.

Time is cut into chunks of C steps, and a program walks them with the state in registers. With the log decays of a
chunk summed up to and behind each step, since_t = g_1 + ... + g_t and until_s = g_{s+1} + ... + g_C, its pairs decay by
a(t, s) = e^{since_t - since_s}, what it reads of the state S before it by e^{since_t}, and what it writes to the state
behind it by e^{until_s}:

    o_t  = e^{since_t} S^T q_t  + sum_{s<=t} a(t, s) (q_t.k_s) v_s
    dq_t = e^{since_t} S do_t   + sum_{s<=t} a(t, s) (do_t.v_s) k_s
    dk_s = e^{until_s} D v_s    + sum_{t>=s} a(t, s) (do_t.v_s) q_t
    dv_s = e^{until_s} D^T k_s  + sum_{t>=s} a(t, s) (q_t.k_s) do_t

D is the gradient of the state behind the chunk; a skip adds to each (q_t.k_t). o is one `walk`, and so is dq, of do, v
and k; dk and dv are found in one walk back, which carries D. `backward_kernel` has both walks, in two programs or one
after the other, or a single walk that loads each S, which the forward pass has kept. Where there are too few programs
for that, and the gradient of a decay or wide heads are too much for two, `forward_kernel` only carries D back, for dv,
and `gradient_kernel` takes each chunk on its own.

The gradient of g_u adds up what goes over step u: S.D e^{g_1 + ... + g_C}, what s < u write to D, what t >= u read of
S, and pairs s < u <= t of the chunk. The last are, over t >= u, q_t.dq_t less k_t.dk_t of all other pairs of the chunk:
those with both steps at u or later cancel, in fp32. No sum is a difference of much larger ones, for which a step's own
pair s = t is kept apart: a decay of e^-20 has an exact gradient, but in fp16, which does not hold its pairs.

ONE: there is a single chunk, so that no state but the first and no gradient of one but the last is read.

COPY: the hardware copies whole tiles of (B T, channels of all heads), which spares most of the registers and
instructions that addresses and masks take.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
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
    """since (C,), until (C,) and the whole decay of a chunk with `left` steps; what is behind them does not decay.

    g: where the chunk's decays are, or the log2 decay of the head.
    """
    row = tl.arange(0, C)
    if DECAY == PER_HEAD:
        count = tl.minimum(left, C)
        passed = tl.minimum(row + 1, count)
        since = g * passed
        until = g * (count - passed)
        whole = g * count
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
    g, stride, left, since, C: tl.constexpr, DECAY: tl.constexpr, ROWS_LATER: tl.constexpr, OWN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """a (C, C), 0 where s > t or, without OWN, s = t. ROWS_LATER: a row is a t and a column an s; else turned."""
    row = tl.arange(0, C)
    i = row[:, None]
    j = row[None, :]
    if DECAY == PER_HEAD:
        between = (i - j if ROWS_LATER else j - i) * g
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
    related = i - j if ROWS_LATER else j - i
    return tl.exp2(tl.where(related >= (0 if OWN else 1), between, float("-inf")))


@triton.jit
def over_each_step(net, writes, C: tl.constexpr):
    """For each u of a chunk: the sum of `net` from u on and of `writes` before u."""
    row = tl.arange(0, C)
    before = tl.where(row > 0, tl.gather(tl.cumsum(writes, 0), tl.maximum(row - 1, 0), 0), 0.0)
    return before + tl.cumsum(net, 0, reverse=True)


@triton.jit
def product_if(LIVE: tl.constexpr, a, b, PRECISION: tl.constexpr):
    """a b, or zeros unless b is LIVE."""
    if LIVE:
        result = tl.dot(a, b, input_precision=PRECISION)
    else:
        result = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    return result


@triton.jit
def load_tile(
    x, b, h, at, T, column, x_b, x_t, x_h, C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, COPY: tl.constexpr
):
    """Steps at, at + 1, ... of one head, its channels column, column + 1, ..."""
    if COPY:
        return x.load([(b * T + at).to(tl.int32), (h * x_h + column).to(tl.int32)])
    else:
        row = tl.arange(0, C)
        x += b * x_b + h * x_h + tl.cast(at, tl.int64) * x_t
        return load_rows(x, row, x_t, at + row < T, column + tl.arange(0, BLOCK), SIZE, BLOCK)


@triton.jit
def store_tile(
    x, values, b, h, at, T, H, column, C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, COPY: tl.constexpr
):
    if COPY:
        x.store([(b * T + at).to(tl.int32), (h * SIZE + column).to(tl.int32)], values.to(x.dtype))
    else:
        row = tl.arange(0, C)
        x += ((b * T + at) * H + h) * SIZE
        store_rows(x, values, row, H * SIZE, at + row < T, column + tl.arange(0, BLOCK), SIZE, BLOCK)


@triton.jit
def walk(
    q, k, v, g, skip, first, o, states, sums, last, b, h, T, H, column, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    g_t, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, SKIP: tl.constexpr, REVERSE: tl.constexpr, TURNED: tl.constexpr, HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr, SAVE: tl.constexpr, KEEP: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of o. SAVE keeps the state that each chunk reads, KEEP the decay since its start of each step.

    TURNED: `first` is in memory as (V, K).
    REVERSE: backwards from the last chunk, with q and k exchanged and do for v: o is dv, the states are each D.
    """
    EXACT: tl.constexpr = PRECISION == "tf32x3"
    READ: tl.constexpr = HAS_FIRST or not ONE
    row = tl.arange(0, C)
    related = row[:, None] <= row[None, :] if REVERSE else row[:, None] >= row[None, :]
    i = tl.arange(0, BLOCK_K)
    j = column + tl.arange(0, BLOCK)
    inside = (i < K)[:, None] & (j < V)[None, :]
    state = i[:, None] * V + j[None, :]
    chunks = tl.cdiv(T, C)
    if HAS_FIRST:
        at_first = i[:, None] + j[None, :] * K if TURNED else state
        S = tl.load(first + at_first, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.zeros((BLOCK_K, BLOCK), tl.float32)
    if DECAY == PER_HEAD:
        b_g = tl.load(g).to(tl.float32) * LOG2E
        a = decay_of_pairs(b_g, g_t, C, row, C, DECAY, not REVERSE, True, EXACT)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        at = chunk * C
        b_q = load_tile(q, b, h, at, T, 0, q_b, q_t, q_h, C, K, BLOCK_K, COPY)
        b_k = load_tile(k, b, h, at, T, 0, k_b, k_t, k_h, C, K, BLOCK_K, COPY)
        b_v = load_tile(v, b, h, at, T, column, v_b, v_t, v_h, C, V, BLOCK, COPY)
        dtype = b_q.dtype
        read = S.to(dtype)
        if SAVE and READ:
            # Zeros are neither kept nor loaded.
            held = (i < tl.minimum(step + HAS_FIRST, 1) * K)[:, None] & (j < V)[None, :]
            tl.store(states + chunk * K * V + state, read, mask=held)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_o = product_if(READ, b_q, read, PRECISION)
        if DECAY == NO_DECAY:
            scores = tl.where(related, scores, 0.0)
        else:
            if DECAY == PER_STEP:
                b_g = g + tl.cast(at, tl.int64) * g_t
            since, until, whole = sums_of_decay(b_g, g_t, T - at, C, DECAY, EXACT)
            if KEEP:
                tl.store(sums + at + row, since)
            if DECAY == PER_STEP:
                a = decay_of_pairs(b_g, g_t, T - at, since, C, DECAY, not REVERSE, True, EXACT)
            scores *= a
            if READ:
                b_o *= tl.exp2(until if REVERSE else since)[:, None]
        if SKIP:
            scores += tl.where(row[:, None] == row[None, :], tl.load(skip).to(tl.float32), 0.0)
        b_o = tl.dot(scores.to(dtype), b_v, b_o, input_precision=PRECISION)
        store_tile(o, b_o, b, h, at, T, H, column, C, V, BLOCK, COPY)
        if HAS_LAST or not ONE:
            if DECAY != NO_DECAY:
                b_v = (b_v * tl.exp2(since if REVERSE else until)[:, None]).to(dtype)
                S *= tl.exp2(whole)
            S = tl.dot(tl.trans(b_k), b_v, S, input_precision=PRECISION)
    if HAS_LAST:
        tl.store(last + state, S, mask=inside)


@kernel
def forward_kernel(
    q, k, v, g, skip, first, o, states, sums, last, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, skip_b, skip_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, SKIP: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    SAVE: tl.constexpr, KEEP: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and BLOCK columns of v."""
    wait_for_earlier()
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    state = head * K * V
    walk(
        q, k, v, g + b * g_b + h * g_h, skip + b * skip_b + h * skip_h, first + state, o,
        states + state * tl.cdiv(T, C), sums + head * tl.cdiv(T, C) * C, last + state,
        b, h, T, H, tl.program_id(0) % blocks * BLOCK, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_t,
        K, V, BLOCK_K, BLOCK, C, DECAY, SKIP, REVERSE, False, HAS_FIRST, HAS_LAST, SAVE, KEEP, ONE, PRECISION, COPY,
    )  # fmt: skip


@triton.jit
def add_up(terms, dg, T, H, chunks, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """dg of all chunks from the terms that the walk has left in memory, several chunks at once."""
    row = tl.arange(0, C)[None, :]
    for begin in range(0, chunks, 4):
        chunk = (begin + tl.arange(0, 4))[:, None]
        live = chunk < chunks
        at = terms + chunk * (2 * C + BLOCK_K)
        net = tl.load(at + row, mask=live, other=0.0)
        writes = tl.load(at + C + row - 1, mask=live & (row > 0), other=0.0)
        across = tl.sum(tl.load(at + 2 * C + tl.arange(0, BLOCK_K)[None, :], mask=live, other=0.0), 1)
        total = across[:, None] + tl.cumsum(writes, 1) + tl.cumsum(net, 1, reverse=True)
        t = chunk * C + row
        tl.store(dg + t * H, total, mask=live & (t < T))


@triton.jit
def walk_back(
    q, k, v, g, skip, states, sums, do, dlast, dq, dk, dv, dg, terms, dskip, dfirst, b, h, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_t, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, SKIP: tl.constexpr, ALONE: tl.constexpr, DECAY_GRADIENT: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, KEPT: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """dk and dv; ALONE: and dq."""
    EXACT: tl.constexpr = PRECISION == "tf32x3"
    READ: tl.constexpr = HAS_FIRST or not ONE
    READ_BACK: tl.constexpr = HAS_LAST or not ONE
    row = tl.arange(0, C)
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    inside = (i < K)[:, None] & (j < V)[None, :]
    state = i[:, None] * V + j[None, :]
    chunks = tl.cdiv(T, C)
    if HAS_LAST:
        D = tl.load(dlast + state, mask=inside, other=0.0).to(tl.float32)
    else:
        D = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if SKIP:
        b_skip = tl.load(skip).to(tl.float32)
        skipped = tl.zeros((C,), tl.float32)
    if DECAY == PER_HEAD:
        b_g = tl.load(g).to(tl.float32) * LOG2E
        a = decay_of_pairs(b_g, g_t, C, row, C, DECAY, False, True, EXACT)
        if ALONE:
            turned = decay_of_pairs(b_g, g_t, C, row, C, DECAY, True, not DECAY_GRADIENT, EXACT)
    for step in range(chunks):
        chunk = chunks - 1 - step
        at = chunk * C
        b_q = load_tile(q, b, h, at, T, 0, q_b, q_t, q_h, C, K, BLOCK_K, COPY)
        b_k = load_tile(k, b, h, at, T, 0, k_b, k_t, k_h, C, K, BLOCK_K, COPY)
        b_v = load_tile(v, b, h, at, T, 0, v_b, v_t, v_h, C, V, BLOCK_V, COPY)
        b_do = load_tile(do, b, h, at, T, 0, do_b, do_t, do_h, C, V, BLOCK_V, COPY)
        if ALONE and READ:
            held = (i < tl.minimum(chunk + HAS_FIRST, 1) * K)[:, None] & (j < V)[None, :]
            b_S = tl.load(states + chunk * K * V + state, mask=held, other=0.0)
        dtype = b_q.dtype
        written = D.to(dtype)
        if DECAY != NO_DECAY:
            if DECAY == PER_STEP:
                b_g = g + tl.cast(at, tl.int64) * g_t
            if KEPT:
                since = tl.load(sums + at + row)
                whole = tl.load(sums + at + C - 1)
                until = whole - since
            else:
                since, until, whole = sums_of_decay(b_g, g_t, T - at, C, DECAY, EXACT)
        if DECAY_GRADIENT:
            b_terms = terms + chunk * (2 * C + BLOCK_K)
            across = tl.zeros((BLOCK_K,), tl.float32)
            if READ and READ_BACK:
                across = tl.exp2(whole) * tl.sum(b_S.to(tl.float32) * D, 1)
            tl.store(b_terms + 2 * C + i, across)

        # A row of these is an s and a column a t.
        scores = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        if DECAY == NO_DECAY:
            scores = tl.where(row[:, None] <= row[None, :], scores, 0.0)
        else:
            if DECAY == PER_STEP:
                a = decay_of_pairs(b_g, g_t, T - at, since, C, DECAY, False, True, EXACT)
            scores *= a
        b_dv = product_if(READ_BACK, b_k, written, PRECISION)
        if DECAY != NO_DECAY and READ_BACK:
            b_dv *= tl.exp2(until)[:, None]
        if SKIP:
            scores += tl.where(row[:, None] == row[None, :], b_skip, 0.0)
        b_dv = tl.dot(scores.to(dtype), b_do, b_dv, input_precision=PRECISION)
        store_tile(dv, b_dv, b, h, at, T, H, 0, C, V, BLOCK_V, COPY)
        slopes = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        if DECAY == NO_DECAY:
            slopes = tl.where(row[:, None] <= row[None, :], slopes, 0.0)
        else:
            slopes *= a
        b_dk = product_if(READ_BACK, b_v, tl.trans(written), PRECISION)
        if DECAY != NO_DECAY and READ_BACK:
            b_dk *= tl.exp2(until)[:, None]
        if SKIP or DECAY_GRADIENT:
            own = tl.sum(tl.where(row[:, None] == row[None, :], slopes, 0.0), 1)
        if SKIP:
            skipped += own
        if DECAY_GRADIENT:
            tl.store(b_terms + C + row, tl.sum(b_k * b_dk, 1))
            slopes = tl.where(row[:, None] < row[None, :], slopes, 0.0)
            within = tl.dot(slopes.to(dtype), b_q, input_precision=PRECISION)
            net = -tl.sum(b_k * within, 1)
            b_dk += within + own[:, None] * b_q
        else:
            b_dk = tl.dot(slopes.to(dtype), b_q, b_dk, input_precision=PRECISION)
        store_tile(dk, b_dk, b, h, at, T, H, 0, C, K, BLOCK_K, COPY)

        if ALONE:
            if KEPT:
                since = tl.load(sums + at + row)
            slopes = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_dq = tl.zeros((C, BLOCK_K), tl.float32)
            if READ:
                b_dq = tl.dot(b_do, tl.trans(b_S), input_precision=PRECISION)
            if DECAY == NO_DECAY:
                slopes = tl.where(row[:, None] >= row[None, :], slopes, 0.0)
            else:
                if DECAY == PER_STEP:
                    turned = decay_of_pairs(b_g, g_t, T - at, since, C, DECAY, True, not DECAY_GRADIENT, EXACT)
                slopes *= turned
                if READ:
                    b_dq *= tl.exp2(since)[:, None]
            b_dq = tl.dot(slopes.to(dtype), b_k, b_dq, input_precision=PRECISION)
            if DECAY_GRADIENT:
                tl.store(b_terms + row, net + tl.sum(b_q * b_dq, 1))
                b_dq += own[:, None] * b_k
            store_tile(dq, b_dq, b, h, at, T, H, 0, C, K, BLOCK_K, COPY)

        if READ:
            if DECAY != NO_DECAY:
                b_q = (b_q * tl.exp2(since)[:, None]).to(dtype)
                D *= tl.exp2(whole)
            D = tl.dot(tl.trans(b_q), b_do, D, input_precision=PRECISION)
    if DECAY_GRADIENT:
        tl.debug_barrier()
        add_up(terms, dg, T, H, chunks, C, BLOCK_K)
    if SKIP:
        tl.store(dskip, tl.sum(skipped))
    if HAS_FIRST:
        tl.store(dfirst + state, D, mask=inside)


@kernel
def backward_kernel(
    q, k, v, g, skip, first, states, sums, do, dlast, dq, dk, dv, dg, terms, dskip, dfirst, T, H, heads,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, do_b, do_t, do_h, skip_b, skip_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, SKIP: tl.constexpr, ALONE: tl.constexpr, TOGETHER: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, KEPT: tl.constexpr,
    ONE: tl.constexpr, PRECISION: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """All gradients of a sequence and head: in one walk ALONE, or in two, TOGETHER in a program or the longer first."""
    wait_for_earlier()
    head = tl.cast(tl.program_id(0) % heads, tl.int64)
    b, h = head // H, head % H
    g += b * g_b + h * g_h
    state = head * K * V
    if TOGETHER or tl.program_id(0) < heads:
        walk_back(
            q, k, v, g, skip + b * skip_b + h * skip_h, states + state * tl.cdiv(T, C),
            sums + head * tl.cdiv(T, C) * C, do, dlast + state, dq, dk, dv, dg + b * T * H + h,
            terms + head * tl.cdiv(T, C) * (2 * C + BLOCK_K), dskip + head, dfirst + state, b, h, T, H, q_b, q_t, q_h,
            k_b, k_t, k_h, v_b, v_t, v_h, g_t, do_b, do_t, do_h,
            K, V, BLOCK_K, BLOCK_V, C, DECAY, SKIP, ALONE, DECAY_GRADIENT, HAS_FIRST, HAS_LAST, KEPT, ONE, PRECISION,
            COPY,
        )  # fmt: skip
    if not ALONE:  # noqa: SIM102 (known as it is compiled, unlike what follows)
        if TOGETHER or tl.program_id(0) >= heads:
            walk(
                do, v, k, g, skip, first + state, dq, states, sums, dlast, b, h, T, H, 0,
                do_b, do_t, do_h, v_b, v_t, v_h, k_b, k_t, k_h, g_t,
                V, K, BLOCK_V, BLOCK_K, C, DECAY, False, False, True, HAS_FIRST, False, False, False, ONE, PRECISION,
                COPY,
            )  # fmt: skip


@kernel
def gradient_kernel(
    q, k, v, g, do, S, D, dq, dk, dg, dskip, T, H, tokens,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    CHUNKS: tl.constexpr, DECAY: tl.constexpr, SKIP: tl.constexpr, DECAY_GRADIENT: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head, CHUNKS and BLOCK columns of dq and dk, with its part of dg, of `tokens`."""
    wait_for_earlier()
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    EXACT: tl.constexpr = PRECISION == "tf32x3"
    block = tl.program_id(0) % blocks
    chunks = tl.cdiv(T, C)
    groups = chunks // CHUNKS
    head = tl.cast(tl.program_id(0) // blocks // groups, tl.int64)
    begin = tl.program_id(0) // blocks % groups * CHUNKS
    b, h = head // H, head % H
    g += b * g_b + h * g_h
    dg += block * tokens + b * T * H + h
    column = block * BLOCK
    row = tl.arange(0, C)
    i = column + tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK_V)
    if SKIP:
        skipped = tl.zeros((C,), tl.float32)
    if DECAY == PER_HEAD:
        b_g = tl.load(g).to(tl.float32) * LOG2E
    for n in range(CHUNKS):
        chunk = begin + n
        at = chunk * C
        state = (head * chunks + chunk) * K * V + i[:, None] * V + j[None, :]
        if DECAY != NO_DECAY:
            if DECAY == PER_STEP:
                b_g = g + tl.cast(at, tl.int64) * g_t
            since, until, whole = sums_of_decay(b_g, g_t, T - at, C, DECAY, EXACT)
        b_do = load_tile(do, b, h, at, T, 0, do_b, do_t, do_h, C, V, BLOCK_V, COPY)
        b_v = load_tile(v, b, h, at, T, 0, v_b, v_t, v_h, C, V, BLOCK_V, COPY)
        b_k = load_tile(k, b, h, at, T, column, k_b, k_t, k_h, C, K, BLOCK, COPY)
        b_q = load_tile(q, b, h, at, T, column, q_b, q_t, q_h, C, K, BLOCK, COPY)
        held = (i < tl.minimum(chunk + HAS_FIRST, 1) * K)[:, None] & (j < V)[None, :]
        b_S = tl.load(S + state, mask=held, other=0.0)
        dtype = b_q.dtype
        b_dq = tl.dot(b_do, tl.trans(b_S), input_precision=PRECISION)
        slopes = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if DECAY == NO_DECAY:
            slopes = tl.where(row[:, None] >= row[None, :], slopes, 0.0)
        else:
            b_dq *= tl.exp2(since)[:, None]
            slopes *= decay_of_pairs(b_g, g_t, T - at, since, C, DECAY, True, True, EXACT)
        if DECAY_GRADIENT or SKIP:
            own = tl.sum(tl.where(row[:, None] == row[None, :], slopes, 0.0), 1)
        if SKIP:
            skipped += own
        if DECAY_GRADIENT:
            slopes = tl.where(row[:, None] > row[None, :], slopes, 0.0)
        b_dq = tl.dot(slopes.to(dtype), b_k, b_dq, input_precision=PRECISION)
        if DECAY_GRADIENT:
            net = tl.sum(b_q * b_dq, 1)
            b_dq += own[:, None] * b_k
        store_tile(dq, b_dq, b, h, at, T, H, column, C, K, BLOCK, COPY)

        held = (i < tl.minimum(chunks - 1 - chunk + HAS_LAST, 1) * K)[:, None] & (j < V)[None, :]
        b_D = tl.load(D + state, mask=held, other=0.0)
        b_dk = tl.dot(b_v, tl.trans(b_D), input_precision=PRECISION)
        # A row of these is an s and a column a t.
        slopes = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        if DECAY == NO_DECAY:
            slopes = tl.where(row[:, None] <= row[None, :], slopes, 0.0)
        else:
            b_dk *= tl.exp2(until)[:, None]
            slopes *= decay_of_pairs(b_g, g_t, T - at, since, C, DECAY, False, True, EXACT)
        if DECAY_GRADIENT:
            slopes = tl.where(row[:, None] < row[None, :], slopes, 0.0)
            writes = tl.sum(b_k * b_dk, 1)
        if DECAY_GRADIENT:
            within = tl.dot(slopes.to(dtype), b_q, input_precision=PRECISION)
            net -= tl.sum(b_k * within, 1)
            b_dk += within + own[:, None] * b_q
            across = tl.exp2(whole) * tl.sum(b_S.to(tl.float32) * b_D)
            tl.store(dg + (at + row) * H, across + over_each_step(net, writes, C), mask=at + row < T)
        else:
            b_dk = tl.dot(slopes.to(dtype), b_q, b_dk, input_precision=PRECISION)
        store_tile(dk, b_dk, b, h, at, T, H, column, C, K, BLOCK, COPY)
    if SKIP:
        tl.store(dskip + begin // CHUNKS * (tokens // T) + head, tl.sum(skipped), mask=block == 0)
