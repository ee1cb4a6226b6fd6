"""Products of a tall matrix with a small one: memory is read and written once, and sums stay in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    x, weight, bias, y, M, N, x_group, x_row, row_blocks, column_blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y (groups, M, N) = x (groups, M, K) weight^T (groups, K, N) + bias (groups, N)."""
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


@triton.jit
def weight_kernel(
    x, dy, dweight, dbias, M, N, K, groups, x_group, x_row, steps, parts, n_blocks, k_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight (parts, groups, N, K) = dy^T x, dbias (parts, groups, N) = sums of dy, over a part of the rows each."""
    k_block = tl.program_id(0) % k_blocks
    n_block = (tl.program_id(0) // k_blocks) % n_blocks
    part = (tl.program_id(0) // k_blocks // n_blocks) % parts
    group = (tl.program_id(0) // k_blocks // n_blocks // parts).to(tl.int64)
    n = n_block * COLUMNS + tl.arange(0, COLUMNS)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([COLUMNS, BLOCK_K], tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
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
            sums += tl.sum(dy_NM.to(tl.float32), 1)
    place = part * groups + group
    at = (place * N + n)[:, None] * K + k[None, :]
    tl.store(dweight + at, total, mask=(n < N)[:, None] & (k < K)[None, :])
    if BIAS and k_block == 0:
        tl.store(dbias + place * N + n, sums, mask=n < N)
