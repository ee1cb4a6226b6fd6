"""Products of mixtures that are made where they are needed: a program has a block of rows, and meets all weights.

With share m of weight W and change x_{t-1} - x_t, y_t = W (x_t + change * m). Back goes, over y of this token and the
next one, dx_t = dy_t W (1 - m) + dy_{t+1} W m. And with E = sum dy_t x_t^T and F = sum dy_{t+1} x_t^T,
dW = E (1 - m) + F m, and dm is the sum over rows of W (F - E).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import block_of_rows, load_masked, store_masked


@triton.jit
def _load_share(shares, at, k, K: tl.constexpr):
    return tl.load(shares + at * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _owner(block, tensors, NS: tl.constexpr, STARTS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block of rows of all weights: whose it is, its tensor, its N and start, and which rows of it."""
    which, tensor, N, start, row = 0, tensors[0], NS[0], STARTS[0], block * BLOCK
    before: tl.constexpr = 0
    for i in tl.static_range(COUNT):
        reached = block >= before
        which, tensor = tl.where(reached, i, which), tl.where(reached, tensors[i], tensor)
        N, start = tl.where(reached, NS[i], N), tl.where(reached, STARTS[i], start)
        row = tl.where(reached, (block - before) * BLOCK, row)
        before = before + (NS[i] + BLOCK - 1) // BLOCK
    return which, tensor, N, start, row + tl.arange(0, BLOCK)


@kernel
def prepare_kernel(
    shares, weights, prepared, weight_groups, weight_rows, weight_columns, row_blocks,
    NS: tl.constexpr, STARTS: tl.constexpr, TOTAL: tl.constexpr, COUNT: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """prepared (groups, 3, TOTAL, K): of all weights W, W (1 - m) and W m."""
    wait_for_earlier()
    group = tl.program_id(0) // (COUNT * row_blocks)
    which = tl.program_id(0) // row_blocks % COUNT
    n, k = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    prepared += group.to(tl.int64) * (3 * TOTAL * K)
    share = _load_share(shares, group * COUNT + which, k, K)
    for i in tl.static_range(COUNT):
        if which == i:
            mask = (n < NS[i])[:, None] & (k < K)[None, :]
            at = weights[i] + group.to(tl.int64) * weight_groups[i]
            at += n[:, None] * weight_rows[i] + k[None, :] * weight_columns[i]
            weight = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            to = prepared + (STARTS[i] + n)[:, None] * K + k[None, :]
            tl.store(to, weight.to(prepared.dtype.element_ty), mask=mask)
            tl.store(to + TOTAL * K, (weight * (1 - share)).to(prepared.dtype.element_ty), mask=mask)
            tl.store(to + 2 * TOTAL * K, (weight * share).to(prepared.dtype.element_ty), mask=mask)


@kernel
def forward_kernel(
    x, shares, prepared, ys, M, T, row_blocks,
    NS: tl.constexpr, STARTS: tl.constexpr, TOTAL: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ys[i] (groups, M, NS[i])."""
    wait_for_earlier()
    group, first_row, row, live = block_of_rows(M, row_blocks, ROWS)
    k = tl.arange(0, BLOCK_K)
    first = group * M + first_row
    here = load_masked(x + first * K, row, K, live, k, k < K)
    before = load_masked(x + first * K, row - 1, K, live & ((first_row + row) % T > 0), k, k < K)
    prepared += group * (3 * TOTAL * K)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        which, y, N, start, n = _owner(block, ys, NS, STARTS, COUNT, BLOCK)
        weight = load_masked(prepared + start * K, n, K, n < N, k, k < K)
        share = _load_share(shares, group * COUNT + which, k, K)
        change = before.to(tl.float32) - here.to(tl.float32)
        mixed = (here.to(tl.float32) + change * share).to(here.dtype)
        values = tl.dot(mixed, tl.trans(weight), input_precision=PRECISION)
        store_masked(y + first * N, values, row, N, live, n, n < N)


@kernel
def input_kernel(
    prepared, dys, dx, M, T, row_blocks,
    NS: tl.constexpr, STARTS: tl.constexpr, TOTAL: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    group, first_row, row, live = block_of_rows(M, row_blocks, ROWS)
    k = tl.arange(0, BLOCK_K)
    followed = live & ((first_row + row) % T < T - 1)
    first = group * M + first_row
    prepared += group * (3 * TOTAL * K)
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        _, dy, N, start, n = _owner(block, dys, NS, STARTS, COUNT, BLOCK)
        now = load_masked(dy + first * N, row, N, live, n, n < N)
        after = load_masked(dy + first * N, row + 1, N, followed, n, n < N)
        present = load_masked(prepared + (TOTAL + start) * K, n, K, n < N, k, k < K)
        past = load_masked(prepared + (2 * TOTAL + start) * K, n, K, n < N, k, k < K)
        total = tl.dot(now, present, total, input_precision=PRECISION)
        total = tl.dot(after, past, total, input_precision=PRECISION)
    store_masked(dx + first * K, total, row, K, live, k, k < K)


@kernel(do_not_specialize=["steps", "parts"])
def weight_kernel(
    x, dys, sums, M, T, steps, parts,
    NS: tl.constexpr, STARTS: tl.constexpr, TOTAL: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sums (groups, parts, 2, TOTAL, K): E and F, over a part of the rows each."""
    wait_for_earlier()
    place = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first = place // parts * M
    begin = tl.program_id(0) // BLOCKS % parts * (steps * ROWS)
    end = tl.minimum(begin + steps * ROWS, M)
    _, dy, N, start, n = _owner(tl.program_id(0) % BLOCKS, dys, NS, STARTS, COUNT, BLOCK)
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    now, past = tl.zeros([BLOCK_K, BLOCK], tl.float32), tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for token in tl.range(begin, end, ROWS, num_stages=STAGES):
        live = token + row < end
        here = tl.trans(load_masked(x + (first + token) * K, row, K, live, k, k < K))
        dy_now = load_masked(dy + (first + token) * N, row, N, live, n, n < N)
        dy_after = load_masked(dy + (first + token) * N, row + 1, N, live & ((token + row) % T < T - 1), n, n < N)
        now = tl.dot(here, dy_now, now, input_precision=PRECISION)
        past = tl.dot(here, dy_after, past, input_precision=PRECISION)
    to = sums + (place * 2 * TOTAL + start) * K + n[None, :] * K + k[:, None]
    mask = (n < N)[None, :] & (k < K)[:, None]
    tl.store(to, now, mask=mask)
    tl.store(to + TOTAL * K, past, mask=mask)


@kernel
def finish_kernel(
    prepared, shares, sums, dweights, dshares, weight_groups, weight_rows, weight_columns, parts, k_blocks,
    NS: tl.constexpr, STARTS: tl.constexpr, TOTAL: tl.constexpr, COUNT: tl.constexpr,
    K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From sums, dweights[i] (groups, NS[i], K) and dshares (groups, COUNT, K)."""
    wait_for_earlier()
    group = (tl.program_id(0) // (COUNT * k_blocks)).to(tl.int64)
    which = tl.program_id(0) // k_blocks % COUNT
    k = tl.program_id(0) % k_blocks * COLUMNS + tl.arange(0, COLUMNS)
    share = _load_share(shares, group * COUNT + which, k, K)
    dshare = tl.zeros([COLUMNS], tl.float32)
    for i in tl.static_range(COUNT):
        if which == i:
            for start in range(0, NS[i], ROWS):
                n = start + tl.arange(0, ROWS)
                live = n < NS[i]
                now, past = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
                for part in tl.range(0, parts, num_stages=4):
                    at = sums + (group * parts + part) * (2 * TOTAL * K) + STARTS[i] * K
                    now += load_masked(at, n, K, live, k, k < K)
                    past += load_masked(at + TOTAL * K, n, K, live, k, k < K)
                weight = load_masked(prepared + group * (3 * TOTAL * K) + STARTS[i] * K, n, K, live, k, k < K)
                dshare += tl.sum(weight.to(tl.float32) * (past - now), 0)
                to = dweights[i] + group * weight_groups[i]
                to += n[:, None] * weight_rows[i] + k[None, :] * weight_columns[i]
                mask = live[:, None] & (k < K)[None, :]
                tl.store(to, (now + (past - now) * share).to(dweights[i].dtype.element_ty), mask=mask)
    tl.store(dshares + (group * COUNT + which) * K + k, dshare.to(dshares.dtype.element_ty), mask=k < K)
