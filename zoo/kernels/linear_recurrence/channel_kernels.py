"""The recurrence where every key channel has its own decay, with or without a bonus for the current token.

As in `scalar_kernels`, the gradients are recurrences too; but here the decay sits on one of two axes. For o and dv it
is the axis that is summed over (`scan_keys`), for dq and dk the axis of the result (`scan_values`):

    o_t  = sum_{s<=t} (sum_c q_tc a_c(t, s) k_sc) v_s        dv_s = sum_{t>=s} (sum_c k_sc a_c(t, s) q_tc) do_t
    dq_tc = sum_{s<=t} (do_t.v_s) a_c(t, s) k_sc             dk_sc = sum_{t>=s} (v_s.do_t) a_c(t, s) q_tc

Inside a chunk a(t, s) must be split into a factor of t and one of s, none above 1. In an aligned block of 2h steps
the first h reach the last h through its middle: a(t, s) = a(t, middle) a(middle, s). Halving h from C/2 to 1 covers
every pair s < t once. The logarithms of the factors are sums of neighbouring decays, made by a product with a matrix of
0 and 1, so that no small number comes out as a difference of large ones. The same holds for dg: a pair's slope
counts for the steps from s to the middle by way of s and for those from the middle to t by way of t, which is a product
with that matrix transposed.

With a bonus the output reads the state before its own step: the decay of step t is left out of a(t, s).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import LOG2E, load_rows, store_rows

# What a scan does about dg: see scalar_kernels.
NOTHING = tl.constexpr(0)
READS = tl.constexpr(1)
WRITES = tl.constexpr(2)


@triton.jit
def decay_of_halves(g, h: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr):
    """Log decay between each step and the middle of its block of 2h; with BEFORE, up to just before the step."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    since_middle = j < i if BEFORE else j <= i
    between = (i // h == j // h) & ((((i // h) % 2 == 1) & since_middle) | (((i // h) % 2 == 0) & (j > i)))
    return tl.dot(between.to(g.dtype), g, input_precision=PRECISION)


@triton.jit
def pairs_of_halves(x, h: tl.constexpr, C: tl.constexpr):
    """x (C, C) where the row is in the last half of a block of 2h and the column in the first half of the same."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return tl.where(((i // h) % 2 == 1) & (i // h == j // h + 1), x, 0.0)


@triton.jit
def slopes_of_halves(x, h: tl.constexpr, C: tl.constexpr, STRICT: tl.constexpr, PRECISION: tl.constexpr):
    """dg of the steps in last halves: the sum of x (C, D) from each step, STRICT: after it, to the end of its half."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    until_end = j > i if STRICT else j >= i
    return tl.dot(((i // h == j // h) & ((i // h) % 2 == 1) & until_end).to(x.dtype), x, input_precision=PRECISION)


@triton.jit
def load_decay(g, at, row, stride_t, stride_c, T, channel, size: tl.constexpr, SHIFT: tl.constexpr):
    """Log2 decays of steps at + row + SHIFT, 0 past the end. Below -1000 nothing is left anyway: fp16 can hold that."""
    live = at + row + SHIFT < T
    pointers = g + at * stride_t + (row + SHIFT)[:, None] * stride_t + channel[None, :] * stride_c
    b_g = tl.load(pointers, mask=live[:, None] & (channel < size)[None, :], other=0.0)
    return tl.maximum(b_g.to(tl.float32) * LOG2E, -1000.0)


@triton.jit
def scan_keys(
    x, stride_x, y, stride_y, z, stride_z, out, stride_out, g, g_t, g_c, u, first, last, T, column,
    I: tl.constexpr, J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    C: tl.constexpr, HALVINGS: tl.constexpr, REVERSE: tl.constexpr, BONUS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_t = sum_{s<=t} (sum_c x_tc a_c(t, s) y_sc) z_s, one head, BLOCK_J columns of z; REVERSE: s>=t and a(s, t).

    x, y, g (T, I); z, out (T, J); first, last (I, J) contiguous: the states before the first and after the last step.
    """
    dtype = x.dtype.element_ty
    # fp16 holds a sum of decays to 2^-11, which is far finer than what 16-bit operands do to the product.
    sum_dtype = tl.float32 if dtype == tl.float32 else tl.float16
    steps = tl.arange(0, C)
    row = C - 1 - steps if REVERSE else steps
    i = tl.arange(0, BLOCK_I)
    j = column + tl.arange(0, BLOCK_J)
    inside = (i < I)[:, None] & (j < J)[None, :]
    state = i[:, None] * J + j[None, :]
    if HAS_FIRST:
        S = tl.load(first + state, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    if BONUS:
        b_u = tl.load(u + i, mask=i < I, other=0.0).to(tl.float32)
    before = (steps[None, :] < steps[:, None] if BONUS else steps[None, :] <= steps[:, None]).to(sum_dtype)
    after = (steps[None, :] > steps[:, None]).to(sum_dtype)
    chunks = tl.cdiv(T, C)
    for chunk in range(chunks):
        start = (chunks - 1 - chunk) * C if REVERSE else chunk * C
        at = tl.cast(start, tl.int64)
        live = start + row < T
        b_x = load_rows(x + at * stride_x, row, stride_x, live, i, I, BLOCK_I)
        b_y = load_rows(y + at * stride_y, row, stride_y, live, i, I, BLOCK_I)
        b_z = load_rows(z + at * stride_z, row, stride_z, live, j, J, BLOCK_J)
        # Backwards, the step to t comes from t+1 and decays by g_{t+1}; with a bonus, by g_t after it has been read.
        b_g = load_decay(g, at, row, g_t, g_c, T, i, I, 1 if REVERSE and not BONUS else 0)
        whole = tl.sum(b_g, 0)
        b_g = b_g.to(sum_dtype)

        now = b_x.to(tl.float32) * b_y
        if BONUS:
            now *= b_u[None, :]
        scores = tl.where(steps[:, None] == steps[None, :], tl.sum(now, 1)[:, None], 0.0)
        for halving in tl.static_range(HALVINGS):
            kept = tl.exp2(decay_of_halves(b_g, C >> (halving + 1), C, BONUS, PRECISION))
            far = (b_x * kept).to(dtype)
            near = (b_y * kept).to(dtype)
            scores += pairs_of_halves(tl.dot(far, tl.trans(near), input_precision=PRECISION), C >> (halving + 1), C)

        since = tl.exp2(tl.dot(before, b_g, input_precision=PRECISION))
        b_out = tl.dot((b_x * since).to(dtype), S.to(dtype), input_precision=PRECISION)
        b_out = tl.dot(scores.to(dtype), b_z, b_out, input_precision=PRECISION)
        store_rows(out + at * stride_out, b_out, row, stride_out, live, j, J, BLOCK_J)

        until = tl.exp2(tl.dot(after, b_g, input_precision=PRECISION))
        S *= tl.exp2(whole)[:, None]
        S = tl.dot(tl.trans((b_y * until).to(dtype)), b_z, S, input_precision=PRECISION)

    if HAS_LAST:
        if REVERSE and not BONUS:
            S *= tl.exp2(tl.load(g + i * g_c, mask=i < I, other=0.0).to(tl.float32) * LOG2E)[:, None]
        tl.store(last + state, S, mask=inside)


@triton.jit
def scan_values(
    x, stride_x, y, stride_y, z, stride_z, out, stride_out, g, g_t, g_c, u, du, first, last, mate, stride_mate,
    crossing, slopes, dg, stride_dg, T, column,
    I: tl.constexpr, J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    C: tl.constexpr, HALVINGS: tl.constexpr, REVERSE: tl.constexpr, BONUS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, CROSSING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_tc = sum_{s<=t} (x_t.y_s) a_c(t, s) z_sc, one head, BLOCK_J columns of z; REVERSE: s>=t and a(s, t).

    x, y (T, I); z, out, g, mate (T, J); first, last (J, I) contiguous: the states before the first and after the last
    step. mate, crossing (chunks + 1, J; a row per chunk) and dg are as in `scalar_kernels.scan`; slopes is the first
    scan's part of dg, which the second completes; du (J,) is written by the first.
    """
    dtype = x.dtype.element_ty
    sum_dtype = tl.float32 if dtype == tl.float32 else tl.float16
    # Slopes have no bound, so their sums need the range of bf16.
    slope_dtype = tl.float32 if dtype == tl.float32 else tl.bfloat16
    steps = tl.arange(0, C)
    row = C - 1 - steps if REVERSE else steps
    i = tl.arange(0, BLOCK_I)
    j = column + tl.arange(0, BLOCK_J)
    inside = (i < I)[:, None] & (j < J)[None, :]
    state = i[:, None] + j[None, :] * I
    if HAS_FIRST:
        S = tl.load(first + state, mask=inside, other=0.0).to(tl.float32)
    else:
        S = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    if BONUS:
        b_u = tl.load(u + j, mask=j < J, other=0.0).to(tl.float32)
        b_du = tl.zeros((BLOCK_J,), tl.float32)
    before = (steps[None, :] < steps[:, None] if BONUS else steps[None, :] <= steps[:, None]).to(sum_dtype)
    after = (steps[None, :] > steps[:, None]).to(sum_dtype)
    # A pair's slope counts for the decay of every step between the two, and of the later one unless there is a bonus.
    STRICT: tl.constexpr = REVERSE or BONUS
    crossed = (steps[None, :] > steps[:, None] if STRICT else steps[None, :] >= steps[:, None]).to(slope_dtype)
    chunks = tl.cdiv(T, C)
    if CROSSING == WRITES:
        past_last = tl.load(crossing + tl.cast(chunks, tl.int64) * J + j, mask=j < J, other=0.0)
        balance = tl.zeros((BLOCK_J,), tl.float32)
    for chunk in range(chunks):
        start = (chunks - 1 - chunk) * C if REVERSE else chunk * C
        at = tl.cast(start, tl.int64)
        live = start + row < T
        b_x = load_rows(x + at * stride_x, row, stride_x, live, i, I, BLOCK_I)
        b_y = load_rows(y + at * stride_y, row, stride_y, live, i, I, BLOCK_I)
        b_z = load_rows(z + at * stride_z, row, stride_z, live, j, J, BLOCK_J)
        b_mate = load_rows(mate + at * stride_mate, row, stride_mate, live, j, J, BLOCK_J)
        b_g = load_decay(g, at, row, g_t, g_c, T, j, J, 1 if REVERSE and not BONUS else 0)
        whole = tl.sum(b_g, 0)
        b_g = b_g.to(sum_dtype)

        since = tl.exp2(tl.dot(before, b_g, input_precision=PRECISION))
        past = tl.dot(b_x, S.to(dtype), input_precision=PRECISION) * since
        b_slope = b_mate * past
        b_dg = tl.dot(crossed, b_slope.to(slope_dtype), input_precision=PRECISION)
        b_out = past
        scores = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
        for halving in tl.static_range(HALVINGS):
            kept = tl.exp2(decay_of_halves(b_g, C >> (halving + 1), C, BONUS, PRECISION))
            far = pairs_of_halves(scores, C >> (halving + 1), C).to(dtype)
            part = tl.dot(far, (b_z * kept).to(dtype), input_precision=PRECISION) * kept
            b_out += part
            b_dg += slopes_of_halves((b_mate * part).to(slope_dtype), C >> (halving + 1), C, STRICT, PRECISION)
        now = tl.sum(tl.where(steps[:, None] == steps[None, :], scores, 0.0), 1)[:, None] * b_z
        if BONUS:
            if CROSSING == READS:
                b_du += tl.sum(b_mate * now, 0)
            now *= b_u[None, :]
        store_rows(out + at * stride_out, b_out + now, row, stride_out, live, j, J, BLOCK_J)

        slope = tl.sum(b_slope, 0)
        if CROSSING == READS:
            tl.store(crossing + tl.cast(chunk, tl.int64) * J + j, slope, mask=j < J)
            store_rows(slopes + at * stride_dg, b_dg, row, stride_dg, live, j, J, BLOCK_J)
        else:
            b_dg += load_rows(slopes + at * stride_dg, row, stride_dg, live, j, J, BLOCK_J)
            over = tl.where(chunk == 0, past_last, balance - slope)
            # Rounding leaves more of it than a decay of 2^-64 does.
            over = tl.where(whole < -64.0, 0.0, over)
            b_dg += over[None, :]
            reads = tl.load(crossing + tl.cast(chunks - 1 - chunk, tl.int64) * J + j, mask=j < J, other=0.0)
            balance = over + reads
            store_rows(dg + at * stride_dg, b_dg, row, stride_dg, live, j, J, BLOCK_J)

        until = tl.exp2(tl.dot(after, b_g, input_precision=PRECISION))
        S *= tl.exp2(whole)[None, :]
        b_z = (b_z * until).to(dtype)
        if CROSSING == READS:
            # The last tokens stay out of the state: what is left then is what goes past them.
            b_z = tl.where(chunk < chunks - 1, b_z, 0.0)
        S = tl.dot(tl.trans(b_y), b_z, S, input_precision=PRECISION)

    if CROSSING == READS:
        past_last = tl.zeros((BLOCK_J,), tl.float32)
        if HAS_LAST:
            past_last = tl.sum(S * tl.load(last + state, mask=inside, other=0.0), 0)
        tl.store(crossing + tl.cast(chunks, tl.int64) * J + j, past_last, mask=j < J)
        if BONUS:
            tl.store(du + j, b_du, mask=j < J)


@triton.jit
def forward_kernel(
    q, k, v, g, u, first, o, last, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, g_c, u_b, u_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, HALVINGS: tl.constexpr, BONUS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and BLOCK columns of v."""
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    column = tl.program_id(0) % blocks * BLOCK
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    scan_keys(
        q + b * q_b + h * q_h, q_t, k + b * k_b + h * k_h, k_t, v + b * v_b + h * v_h, v_t,
        o + (b * T * H + h) * V, H * V, g + b * g_b + h * g_h, g_t, g_c, u + b * u_b + h * u_h,
        first + head * K * V, last + head * K * V, T, column,
        K, V, BLOCK_K, BLOCK, C, HALVINGS, False, BONUS, HAS_FIRST, HAS_LAST, PRECISION,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    q, k, v, g, u, first, do, dlast, dq, dk, dv, dg, du, dfirst, slopes, crossing, T, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, g_c, u_b, u_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, C: tl.constexpr, HALVINGS: tl.constexpr,
    BONUS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and block of columns, of dq and then dk, dg and du, or of dv."""
    k_blocks: tl.constexpr = (K + BLOCK_DK - 1) // BLOCK_DK
    roles: tl.constexpr = k_blocks + (V + BLOCK_DV - 1) // BLOCK_DV
    role = tl.program_id(0) % roles
    head = tl.cast(tl.program_id(0) // roles, tl.int64)
    b, h = head // H, head % H
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    g += b * g_b + h * g_h
    u += b * u_b + h * u_h
    do += b * do_b + h * do_h
    tokens = b * T * H + h
    dlast += head * K * V
    if role < k_blocks:
        column = role * BLOCK_DK
        crossing += head * (tl.cdiv(T, C) + 1) * K
        dg += tokens * K
        slopes += tokens * K
        scan_values(
            do, do_t, v, v_t, k, k_t, dq + tokens * K, H * K, g, g_t, g_c, u, du + head * K,
            first + head * K * V, dlast, q, q_t, crossing, slopes, dg, H * K, T, column,
            V, K, BLOCK_V, BLOCK_DK, C, HALVINGS, False, BONUS, HAS_FIRST, HAS_LAST, READS, PRECISION,
        )  # fmt: skip
        # What the first scan wrote is read by other threads in the second.
        tl.debug_barrier()
        scan_values(
            v, v_t, do, do_t, q, q_t, dk + tokens * K, H * K, g, g_t, g_c, u, du,
            dlast, dlast, k, k_t, crossing, slopes, dg, H * K, T, column,
            V, K, BLOCK_V, BLOCK_DK, C, HALVINGS, True, BONUS, HAS_LAST, False, WRITES, PRECISION,
        )  # fmt: skip
    else:
        scan_keys(
            k, k_t, q, q_t, do, do_t, dv + tokens * V, H * V, g, g_t, g_c, u, dlast, dfirst + head * K * V, T,
            (role - k_blocks) * BLOCK_DV,
            K, V, BLOCK_K, BLOCK_DV, C, HALVINGS, True, BONUS, HAS_LAST, HAS_FIRST, PRECISION,
        )  # fmt: skip
