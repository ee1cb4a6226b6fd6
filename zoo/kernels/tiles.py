"""Tiles of rows: what kernels load and store."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(x, row, stride, live, column, size: tl.constexpr, block: tl.constexpr):
    """Rows and columns of x; zeros in rows that are not live and in columns past `size`."""
    mask = live[:, None]
    if size % block != 0:
        mask = mask & (column < size)[None, :]
    return tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, values, row, stride, live, column, size: tl.constexpr, block: tl.constexpr):
    mask = live[:, None]
    if size % block != 0:
        mask = mask & (column < size)[None, :]
    tl.store(x + row[:, None] * stride + column[None, :], values.to(x.dtype.element_ty), mask=mask)
