"""The recurrence where the channels of a head share their decay, or where nothing decays.

The gradients of a linear recurrence are linear recurrences. With a(t, s) = exp(g_{s+1} + ... + g_t),

    o_t  = sum_{s<=t} a(t, s) (q_t.k_s) v_s
    dq_t = sum_{s<=t} a(t, s) (do_t.v_s) k_s
    dk_s = sum_{t>=s} a(t, s) (v_s.do_t) q_t
    dv_s = sum_{t>=s} a(t, s) (k_s.q_t) do_t

so one function, `scan`, serves all four: for dk and dv it walks time backwards. The initial and the final state take
part as terms from before the first and after the last token.

Only g needs more: dg_u is the sum, over all pairs s < u <= t, of a(t, s) (q_t.k_s) (do_t.v_s). Pairs within a chunk
are summed directly. A pair in two chunks is cut at their borders: what token t reads from the state before its chunk
crosses u <= t there (the scan for dq finds it), what token s writes to the state behind its chunk crosses u > s there
(the scan for dk), and a running balance of the two crosses the chunks between. So within a chunk nothing small is a
difference of two large sums, and a decay of e^-20 has an exact gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import LOG2E, load_rows, store_rows

NO_DECAY = tl.constexpr(0)
PER_HEAD = tl.constexpr(1)
PER_STEP = tl.constexpr(2)
# What a scan does about dg.
NOTHING = tl.constexpr(0)
READS = tl.constexpr(1)
WRITES = tl.constexpr(2)


@triton.jit
def load_decay(g, at, row, stride, T, C: tl.constexpr, REVERSE: tl.constexpr):
    """Log2 decays of the steps to rows of the chunk at `at`; 0 for rows outside the chunk or the sequence."""
    source = row + 1 if REVERSE else row
    mask = (row >= 0) & (row < C) & (at + source < T)
    return tl.load(g + (at + source) * stride, mask=mask, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def scan(
    x, stride_x, y, stride_y, z, stride_z, out, stride_out, g, stride_g, first, last, stride_i, stride_j,
    mate, stride_mate, crossing, dg, stride_dg, T, column,
    I: tl.constexpr, J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    CROSSING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_t = sum_{s<=t} a(t, s) (x_t.y_s) z_s, one head, BLOCK_J columns of z; REVERSE: s>=t and a(s, t).

    x, y (T, I); z, out, mate (T, J); first, last (I, J): the state before the first step and after the last one.
    mate is q in the scan for dq and k in that for dk. crossing (chunks * C + 1,) goes from the first to the second: by
    token, what it reads from the state before its chunk; at the end, what goes past the last chunk to the final state.
    """
    dtype = x.dtype.element_ty
    steps = tl.arange(0, C)
    row = C - 1 - steps if REVERSE else steps
    i = tl.arange(0, BLOCK_I)
    j = column + tl.arange(0, BLOCK_J)
    inside = (i < I)[:, None] & (j < J)[None, :]
    state = i[:, None] * stride_i + j[None, :] * stride_j
    if HAS_FIRST:
        S = tl.load(first + state, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    causal = steps[:, None] >= steps[None, :]
    later = steps[:, None] > steps[None, :]
    chunks = tl.cdiv(T, C)
    if DECAY == PER_HEAD:
        g_head = tl.load(g).to(tl.float32) * LOG2E
        a = tl.exp2(tl.where(causal, (steps[:, None] - steps[None, :]) * g_head, float("-inf")))
    if CROSSING == WRITES:
        up_to = (steps[:, None] <= steps[None, :]).to(dtype)
        past_last = tl.load(crossing + tl.cast(chunks, tl.int64) * C)
        balance = 0.0

    for chunk in range(chunks):
        start = (chunks - 1 - chunk) * C if REVERSE else chunk * C
        at = tl.cast(start, tl.int64)
        live = start + row < T
        b_x = load_rows(x + at * stride_x, row, stride_x, live, i, I, BLOCK_I)
        b_y = load_rows(y + at * stride_y, row, stride_y, live, i, I, BLOCK_I)
        b_z = load_rows(z + at * stride_z, row, stride_z, live, j, J, BLOCK_J)
        if CROSSING != NOTHING:
            b_mate = load_rows(mate + at * stride_mate, row, stride_mate, live, j, J, BLOCK_J)
        # Padding does not decay. Backwards, the step to t comes from t+1 and decays by g_{t+1}.
        if DECAY == PER_HEAD:
            padding = tl.maximum(start + C + 1 - T, 0) if REVERSE else tl.maximum(start + C - T, 0)
            passed = tl.maximum(steps + 1 - padding, 0) if REVERSE else tl.minimum(steps + 1, C - padding)
            since = g_head * passed
            until = g_head * (C - padding - passed)
            whole = g_head * (C - padding)
        elif DECAY == PER_STEP:
            since = tl.cumsum(load_decay(g, at, row, stride_g, T, C, REVERSE), 0)
            until = tl.cumsum(
                load_decay(g, at, row - 1 if REVERSE else row + 1, stride_g, T, C, REVERSE), 0, reverse=True
            )
            whole = tl.min(since, 0)
            if dtype == tl.float32:
                # A difference of sums would keep only the absolute error of the larger one.
                b_g = load_decay(g, at, row, stride_g, T, C, REVERSE)
                between = tl.where(later, b_g[:, None], 0.0)
                between = tl.dot(causal.to(tl.float32), between, input_precision=PRECISION)
            else:
                between = since[:, None] - since[None, :]
            a = tl.exp2(tl.where(causal, between, float("-inf")))

        scores = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
        if DECAY == NO_DECAY:
            scores = tl.where(causal, scores, 0.0)
        else:
            scores *= a
        past = tl.dot(b_x, S.to(dtype), input_precision=PRECISION)
        if DECAY != NO_DECAY:
            past *= tl.exp2(since)[:, None]
        b_out = tl.dot(scores.to(dtype), b_z, past, input_precision=PRECISION)
        store_rows(out + at * stride_out, b_out, row, stride_out, live, j, J, BLOCK_J)

        if CROSSING == READS:
            tl.store(crossing + at + row, tl.sum(b_mate * past, 1))
        if CROSSING == WRITES:
            # Backwards: row s of a pair comes after its column t.
            pairs = tl.where(later, scores, 0.0) * tl.dot(b_mate, tl.trans(b_z), input_precision=PRECISION)
            pairs = tl.dot(pairs.to(dtype), up_to, input_precision=PRECISION)
            writes = tl.sum(b_mate * past, 1)
            reads = tl.load(crossing + at + row)
            over = tl.where(chunk == 0, past_last, balance - tl.sum(writes, 0))
            # Rounding leaves more of it than a decay of 2^-64 does.
            over = tl.where(whole < -64.0, 0.0, over)
            b_dg = over + tl.sum(tl.where(later, pairs + writes[:, None], reads[:, None]), 0)
            tl.store(dg + (at + row) * stride_dg, b_dg, mask=live)
            balance = over + tl.sum(reads, 0)

        if DECAY != NO_DECAY:
            b_z = (b_z * tl.exp2(until)[:, None]).to(dtype)
            S *= tl.exp2(whole)
        if CROSSING == READS:
            # The last tokens stay out of the state: what is left then is what goes past them.
            b_z = tl.where(chunk < chunks - 1, b_z, 0.0)
        S = tl.dot(tl.trans(b_y), b_z, S, input_precision=PRECISION)

    if CROSSING == READS:
        past_last = 0.0
        if HAS_LAST:
            past_last = tl.sum(S * tl.load(last + state, mask=inside, other=0.0))
        tl.store(crossing + tl.cast(chunks, tl.int64) * C, past_last)
    elif HAS_LAST:
        if REVERSE and DECAY != NO_DECAY:
            S *= tl.exp2(tl.load(g).to(tl.float32) * LOG2E)
        tl.store(last + state, S, mask=inside)


@triton.jit
def forward_kernel(
    q, k, v, g, first, o, last, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and BLOCK columns of v."""
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    column = tl.program_id(0) % blocks * BLOCK
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    state = head * K * V
    o += (b * T * H + h) * V
    scan(
        q + b * q_b + h * q_h, q_t, k + b * k_b + h * k_h, k_t, v + b * v_b + h * v_h, v_t, o, H * V,
        g + b * g_b + h * g_h, g_t, first + state, last + state, V, 1, o, 0, o, o, 0, T, column,
        K, V, BLOCK_K, BLOCK, C, DECAY, False, HAS_FIRST, HAS_LAST, NOTHING, PRECISION,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    q, k, v, g, first, do, dlast, dq, dk, dv, dg, dfirst, crossing, T, H, dg_block,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DECAY_GRADIENT: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and block of columns of dq, dk or dv.

    With DECAY_GRADIENT the program of a block of dq goes on with that of dk, which needs what the first found.
    """
    k_blocks: tl.constexpr = (K + BLOCK_DK - 1) // BLOCK_DK
    v_blocks: tl.constexpr = (V + BLOCK_DV - 1) // BLOCK_DV
    roles: tl.constexpr = (k_blocks if DECAY_GRADIENT else 2 * k_blocks) + v_blocks
    role = tl.program_id(0) % roles
    head = tl.cast(tl.program_id(0) // roles, tl.int64)
    b, h = head // H, head % H
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    g += b * g_b + h * g_h
    do += b * do_b + h * do_h
    dq += (b * T * H + h) * K
    dk += (b * T * H + h) * K
    dv += (b * T * H + h) * V
    dg += b * T * H + h
    state = head * K * V
    first += state
    dfirst += state
    dlast += state
    if role < k_blocks:
        crossing += (head * k_blocks + role) * (tl.cdiv(T, C) * C + 1)
        column = role * BLOCK_DK
        scan(
            do, do_t, v, v_t, k, k_t, dq, H * K, g, g_t, first, dlast, 1, V, q, q_t, crossing, dg, H, T, column,
            V, K, BLOCK_V, BLOCK_DK, C, DECAY, False, HAS_FIRST, HAS_LAST and DECAY_GRADIENT,
            READS if DECAY_GRADIENT else NOTHING, PRECISION,
        )  # fmt: skip
        if DECAY_GRADIENT:
            tl.debug_barrier()
            scan(
                v, v_t, do, do_t, q, q_t, dk, H * K, g, g_t, dlast, first, 1, V, k, k_t, crossing,
                dg + tl.cast(role, tl.int64) * dg_block, H, T, column,
                V, K, BLOCK_V, BLOCK_DK, C, DECAY, True, HAS_LAST, False, WRITES, PRECISION,
            )  # fmt: skip
    elif role < roles - v_blocks:
        scan(
            v, v_t, do, do_t, q, q_t, dk, H * K, g, g_t, dlast, first, 1, V, k, k_t, crossing, dg, H, T,
            (role - k_blocks) * BLOCK_DK,
            V, K, BLOCK_V, BLOCK_DK, C, DECAY, True, HAS_LAST, False, NOTHING, PRECISION,
        )  # fmt: skip
    else:
        scan(
            k, k_t, q, q_t, do, do_t, dv, H * V, g, g_t, dlast, dfirst, V, 1, k, k_t, crossing, dg, H, T,
            (role - (roles - v_blocks)) * BLOCK_DV,
            K, V, BLOCK_K, BLOCK_DV, C, DECAY, True, HAS_LAST, HAS_FIRST, NOTHING, PRECISION,
        )  # fmt: skip
