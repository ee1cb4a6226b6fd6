"""Tiles of rows: which are a program's, and what kernels load and store."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def block_of_rows(M, row_blocks, ROWS: tl.constexpr):
    """A program's block of the M rows of a group: the group, its first row there, the rows from that on, those live."""
    start = tl.program_id(0) % row_blocks * ROWS
    group = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = tl.arange(0, ROWS)
    return group, start, row, start + row < M


@triton.jit
def load_rows(x, row, stride, live, column, size: tl.constexpr, block: tl.constexpr):
    """Rows and columns of x; zeros in rows that are not live and in columns past `size`."""
    mask = live[:, None]
    if size % block != 0:
        mask = mask & (column < size)[None, :]
    return tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_masked(x, row, stride, live, column, inside):
    """As load_rows, given which columns are inside in place of a size."""
    return tl.load(x + row[:, None] * stride + column[None, :], mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit
def store_rows(x, values, row, stride, live, column, size: tl.constexpr, block: tl.constexpr):
    mask = live[:, None]
    if size % block != 0:
        mask = mask & (column < size)[None, :]
    tl.store(x + row[:, None] * stride + column[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store_masked(x, values, row, stride, live, column, inside):
    """As store_rows, given which columns are inside."""
    at = x + row[:, None] * stride + column[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def product_in_two(a, b, total, PRECISION: tl.constexpr):
    """total + a b for a in fp32 and b in 16 bits, where rounding a would cost too much: a as a sum of two numbers."""
    dtype = b.dtype
    high = a.to(dtype)
    total = tl.dot(high, b, total, input_precision=PRECISION)
    if dtype != tl.float32:
        total = tl.dot((a - high.to(tl.float32)).to(dtype), b, total, input_precision=PRECISION)
    return total
