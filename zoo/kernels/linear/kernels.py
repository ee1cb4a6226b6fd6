"""Products of a tall matrix with a small one: memory is read and written once, and sums stay in registers."""

from __future__ import annotations

import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier


@kernel
def forward_kernel(
    x, weight, bias, y, M, N, x_group, x_row, row_blocks, column_blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y (groups, M, N) = x (groups, M, K) weight^T (groups, K, N) + bias (groups, N)."""
    wait_for_earlier()
    column_block = tl.program_id(0) % column_blocks
    row_block = (tl.program_id(0) // column_blocks) % row_blocks
    group = (tl.program_id(0) // column_blocks // row_blocks).to(tl.int64)
    # Bases of 64 bits and offsets of 32 within the tile: registers are scarce.
    within = tl.arange(0, ROWS)
    m = row_block * ROWS + within
    x += group * x_group + (row_block * ROWS).to(tl.int64) * x_row
    y += (group * M + row_block * ROWS) * N
    weight += group * N * K
    n = column_block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_MK = tl.load(x + within[:, None] * x_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        w_KN = tl.load(weight + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(x_MK, w_KN.to(x_MK.dtype), total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + group * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = within[:, None] * N + n[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@kernel
def weight_kernel(
    x, dys, dweights, dbiases, NS, M, K, groups, x_group, x_row, steps, parts, blocks, k_blocks,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dweights[i] (parts, groups, NS[i], K) = dys[i]^T x and dbiases[i] = sums of dys[i], over a part of the rows each.

    The `blocks` of all layers that meet the same rows stand next to each other, so that x comes from the cache.
    """
    wait_for_earlier()
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks % parts
    group = (tl.program_id(0) // blocks // parts).to(tl.int64)
    k = block % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    # The layer that this program's number falls into.
    before = block // k_blocks
    n_block, N, dy, dweight, dbias = before, NS[0], dys[0], dweights[0], dbiases[0]
    for i in tl.static_range(1, COUNT):
        before -= tl.cdiv(NS[i - 1], COLUMNS)
        here = before >= 0
        n_block, N = tl.where(here, before, n_block), tl.where(here, NS[i], N)
        dy, dweight = tl.where(here, dys[i], dy), tl.where(here, dweights[i], dweight)
        dbias = tl.where(here, dbiases[i], dbias)
    n = n_block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, BLOCK_K], tl.float32)
    sums = tl.zeros([COLUMNS, 16], tl.float32)
    within = tl.arange(0, ROWS)
    first = part * steps * ROWS
    x += group * x_group + first.to(tl.int64) * x_row
    dy += (group * M + first) * N
    for _ in range(steps):
        live = first + within < M
        dy_NM = tl.load(dy + within[None, :] * N + n[:, None], mask=live[None, :] & (n < N)[:, None], other=0.0)
        x_MK = tl.load(x + within[:, None] * x_row + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        first += ROWS
        x += ROWS * x_row
        dy += ROWS * N
        total = tl.dot(dy_NM, x_MK.to(dy_NM.dtype), total, input_precision=PRECISION)
        if BIAS:
            # As a product too: a sum would have to load dy into registers.
            sums = tl.dot(dy_NM, tl.full([ROWS, 16], 1.0, dy_NM.dtype), sums, input_precision=PRECISION)
    place = part * groups + group
    at = (place * N + n)[:, None] * K + k[None, :]
    tl.store(dweight + at, total, mask=(n < N)[:, None] & (k < K)[None, :])
    if BIAS and block % k_blocks == 0:
        tl.store(dbias + place * N + n, tl.max(sums, 1), mask=n < N)
