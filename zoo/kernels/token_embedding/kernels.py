"""Sums of slopes over the places of each token, which stand in a row once the tokens are sorted.

A frequent token, such as a filler, has places in several blocks of LIMIT; `blocks_kernel` adds these up first. A block
meets at most two frequent tokens, for each has more places than LIMIT: that of its first place and that of its last.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    tokens, table, x, places, of_group, V, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    row = (at // of_group).to(tl.int64) * V + tl.load(tokens + at, mask=at < places, other=0)
    mask = (at < places)[:, None] & (column < D)[None, :]
    values = tl.load(table + row[:, None] * D + column[None, :], mask=mask)
    tl.store(x + at.to(tl.int64)[:, None] * D + column[None, :], values, mask=mask)


@triton.jit
def _sum_places(slopes, order, start, end, column, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, end, ROWS):
        at = first + tl.arange(0, ROWS)
        place = tl.load(order + at, mask=at < end, other=0)
        mask = (at < end)[:, None] & (column < D)[None, :]
        total += tl.sum(tl.load(slopes + place[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    return total


@triton.jit
def blocks_kernel(
    slopes, order, sorted_tokens, starts, sums, places,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """sums (blocks, 2, D): of the first and of the last token of each block, where these are frequent."""
    block = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    begin, close = block * LIMIT, tl.minimum(block * LIMIT + LIMIT, places)
    for which in tl.static_range(2):
        token = tl.load(sorted_tokens + (begin if which == 0 else close - 1))
        start, end = tl.load(starts + token), tl.load(starts + token + 1)
        if end - start > LIMIT:
            total = _sum_places(
                slopes, order, tl.maximum(start, begin), tl.minimum(end, close), column, D, BLOCK_D, ROWS
            )
            tl.store(sums + (block * 2 + which).to(tl.int64) * D + column, total, mask=column < D)


@triton.jit
def tokens_kernel(
    slopes, order, sorted_tokens, starts, sums, out,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    start, end = tl.load(starts + token), tl.load(starts + token + 1)
    if end - start <= LIMIT:
        total = _sum_places(slopes, order, start, end, column, D, BLOCK_D, ROWS)
    else:
        total = tl.zeros([BLOCK_D], tl.float32)
        for block in range(start // LIMIT, (end + LIMIT - 1) // LIMIT):
            which = (tl.load(sorted_tokens + block * LIMIT) != token).to(tl.int64)
            total += tl.load(sums + (block * 2 + which) * D + column, mask=column < D, other=0.0)
    tl.store(out + token.to(tl.int64) * D + column, total.to(out.dtype.element_ty), mask=column < D)
