"""Sums over the features of tokens: the states between chunks, and the state that a caller gives or gets.

Inside, S has the rows (i, j) = scale x_i x_j for i and j < BLOCK_K, of which those with i < K are written: each pair of
channels twice, so that the rows of an i are x times one number of each token. Then come the WIDE rows of (x, 1). z has
WIDE x WIDE sums of products of (x, 1) with itself. A caller's state has each pair once (`features.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import load_rows, product_in_two


@triton.jit
def at_head(x, b, h, x_b, x_t, x_h, UNIT: tl.constexpr):
    """x where a head of a sequence begins, and its stride of time.

    UNIT divides the strides: from how they are written Triton sees that rows of 24 channels can be loaded whole.
    """
    return x + b * (x_b // UNIT * UNIT) + h * (x_h // UNIT * UNIT), x_t // UNIT * UNIT


@triton.jit
def at_chunk(S, z, chunk, V: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr):
    """S and z of a chunk, counted from where they point to."""
    chunk = tl.cast(chunk, tl.int64)
    return S + chunk * (BLOCK_K * BLOCK_K + WIDE) * V, z + chunk * WIDE * WIDE


@triton.jit
def callers_row(i, j, K: tl.constexpr):
    """Of row (i, j), K standing for 1: the feature in a caller's state, and the weight that makes ours one of it."""
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    feature = tl.where(high < K, 1 + K + low * K - low * (low - 1) // 2 + high - low, tl.where(low < K, 1 + low, 0))
    weight = tl.where(high < K, tl.where(i == j, 0.7071067811865476, 1.0), tl.where(low < K, (1.0 / K) ** 0.25, 1.0))
    return feature, weight


@triton.jit
def sum_second_order(
    x, x_t, y, y_t, over_norm, S, z, S_first, S_last, part, column, T, L, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, C: tl.constexpr, FACTOR: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, C)
    v = column + tl.arange(0, BLOCK)
    channel = part * ROWS + tl.arange(0, ROWS)
    others = tl.arange(0, BLOCK_K)[None, None, :]
    row = tl.arange(0, ROWS * BLOCK_K)
    i, j = part * ROWS + row // BLOCK_K, row % BLOCK_K
    feature, weight = callers_row(i, j, K)
    weight *= FACTOR
    known = (i < K) & (j < K)
    pointers = feature[None, :] * V + v[:, None]
    total = tl.zeros((BLOCK, ROWS * BLOCK_K), tl.float32)
    if HAS_FIRST:
        total += tl.load(S_first + pointers, mask=known[None, :] & (v < V)[:, None], other=0.0) / weight[None, :]
    steps = tl.cdiv(T, C)
    for step in range(steps):
        first = (steps - 1 - step if BACKWARD else step) * C
        if KEEP and (step == 0 or (first + C if BACKWARD else first) % L == 0):
            S_before, _ = at_chunk(S, z, first // L, V, BLOCK_K, WIDE)
            S_before += part * ROWS * BLOCK_K * V
            tl.store(S_before + row[None, :] * V + v[:, None], total.to(x.dtype.element_ty), mask=(v < V)[:, None])
        at = tl.cast(first, tl.int64)
        live = first + token < T
        b_y = load_rows(y + at * y_t, token, y_t, live, v, V, BLOCK)
        b_x = x + (at + token[:, None, None]) * x_t
        left = tl.load(b_x + channel[None, :, None], mask=live[:, None, None] & (channel < K)[None, :, None], other=0.0)
        right = tl.load(b_x + others, mask=live[:, None, None] & (others < K), other=0.0)
        left = left.to(tl.float32) * scale
        if BACKWARD:
            left *= tl.load(over_norm + at + token[:, None, None], mask=live[:, None, None], other=0.0)
        phi = tl.reshape(left * right.to(tl.float32), (C, ROWS * BLOCK_K)).to(b_y.dtype)
        total = tl.dot(tl.trans(b_y), phi, total, input_precision=PRECISION)
    if HAS_LAST:
        once = (known & (i <= j))[None, :] & (v < V)[:, None]
        tl.store(S_last + pointers, total * weight[None, :], mask=once)


@triton.jit
def sum_lower_orders(
    x, x_t, y, y_t, over_norm, mean, S, z, S_first, z_first, S_last, z_last, column, T, L, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    C: tl.constexpr, FACTOR: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first order and the constant of S, and all of z."""
    dtype = x.dtype.element_ty
    token, i, v = tl.arange(0, C), tl.arange(0, WIDE), column + tl.arange(0, BLOCK)
    feature, weight = callers_row(i, tl.full((WIDE,), K, tl.int32), K)
    weight *= FACTOR
    pointers = feature[:, None] * V + v[None, :]
    inside = (i <= K)[:, None] & (v < V)[None, :]
    z_feature, z_weight = callers_row(i[:, None], i[None, :], K)
    unit = tl.where((i < K)[:, None] & (i < K)[None, :], scale, 1.0)
    z_weight *= FACTOR * unit
    known = (i <= K)[:, None] & (i <= K)[None, :]
    total = tl.zeros((WIDE, BLOCK), tl.float32)
    norm = tl.zeros((WIDE, WIDE), tl.float32)
    if HAS_FIRST:
        total += tl.load(S_first + pointers, mask=inside, other=0.0) / weight[:, None]
        norm += tl.load(z_first + z_feature, mask=known, other=0.0) / z_weight
    steps = tl.cdiv(T, C)
    for step in range(steps):
        first = (steps - 1 - step if BACKWARD else step) * C
        if KEEP and (step == 0 or (first + C if BACKWARD else first) % L == 0):
            S_before, z_before = at_chunk(S, z, first // L, V, BLOCK_K, WIDE)
            S_before += BLOCK_K * BLOCK_K * V
            tl.store(S_before + i[:, None] * V + v[None, :], total.to(dtype), mask=(v < V)[None, :])
            if column == 0:
                tl.store(z_before + i[:, None] * WIDE + i[None, :], norm * unit)
        at = tl.cast(first, tl.int64)
        live = first + token < T
        b_x = load_rows(x + at * x_t, token, x_t, live, i, K, 2 * K)
        b_x = tl.where((i == K)[None, :] & live[:, None], 1.0, b_x.to(tl.float32))
        b_y = load_rows(y + at * y_t, token, y_t, live, v, V, BLOCK)
        if BACKWARD:
            n = tl.load(over_norm + at + token, mask=live, other=0.0)
            m = -n * tl.load(mean + at + token, mask=live, other=0.0)
            total = tl.dot(tl.trans((b_x * n[:, None]).to(dtype)), b_y, total, input_precision=PRECISION)
            norm = product_in_two(tl.trans(b_x * m[:, None]), b_x.to(dtype), norm, PRECISION)
        else:
            b_x = b_x.to(dtype)
            total = tl.dot(tl.trans(b_x), b_y, total, input_precision=PRECISION)
            norm = tl.dot(tl.trans(b_x), b_x, norm, input_precision=PRECISION)
    if HAS_LAST:
        tl.store(S_last + pointers, total * weight[:, None], mask=inside)
        if column == 0:
            tl.store(z_last + z_feature, norm * z_weight, mask=known & (i[:, None] <= i[None, :]))


@kernel
def sum_kernel(
    x, y, over_norm, mean, S, z, S_first, z_first, S_last, z_last, T, H, L, scale,
    x_b, x_t, x_h, y_b, y_t, y_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """S and z before each chunk of L tokens and after the last one: a program for BLOCK columns and ROWS of the i,
    or all rows of lower order.

    Forward x = k and y = v: S = sum phi(k_t) v_t^T, z = sum phi(k_t). BACKWARD x = q and y = do, from the end of the
    sequence to its start: S = sum n_t phi(q_t) do_t^T, z = -sum n_t mean_t phi(q_t), n = over_norm.
    """
    wait_for_earlier()
    groups: tl.constexpr = (K + ROWS - 1) // ROWS
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    # With n = 1 / 2(phi(q).z + eps), half of what a caller's has.
    FACTOR: tl.constexpr = 2.0 if BACKWARD else 1.0
    column = tl.program_id(0) % blocks * BLOCK
    part = tl.program_id(0) // blocks % (groups + 1)
    head = tl.cast(tl.program_id(0) // (blocks * (groups + 1)), tl.int64)
    b, h = head // H, head % H
    x, x_t = at_head(x, b, h, x_b, x_t, x_h, UNIT)
    y, y_t = at_head(y, b, h, y_b, y_t, y_h, UNIT)
    over_norm += head * T
    S, z = at_chunk(S, z, head * tl.cdiv(T, L), V, BLOCK_K, WIDE)
    S_first += head * F * V
    S_last += head * F * V
    if part > 0:
        sum_second_order(
            x, x_t, y, y_t, over_norm, S, z, S_first, S_last, part - 1, column, T, L, scale,
            K, V, BLOCK_K, BLOCK, ROWS, WIDE, C, FACTOR, BACKWARD, KEEP, HAS_FIRST, HAS_LAST, PRECISION,
        )  # fmt: skip
    else:
        sum_lower_orders(
            x, x_t, y, y_t, over_norm, mean + head * T, S, z, S_first, z_first + head * F, S_last, z_last + head * F,
            column, T, L, scale,
            K, V, BLOCK_K, BLOCK, WIDE, C, FACTOR, BACKWARD, KEEP, HAS_FIRST, HAS_LAST, PRECISION,
        )  # fmt: skip
