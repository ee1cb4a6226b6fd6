"""Sums of slopes over the places of each token, which stand in a row once the tokens are sorted.

A frequent token, such as a filler, has places in several blocks of LIMIT; `blocks_kernel` adds these up first. A block
meets at most two frequent tokens, for each has more places than LIMIT: that of its first place and that of its last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier


@kernel
def gather_kernel(
    tokens, table, x, places, of_group, V, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    wait_for_earlier()
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    row = (at // of_group).to(tl.int64) * V + tl.load(tokens + at, mask=at < places, other=0)
    mask = (at < places)[:, None] & (column < D)[None, :]
    values = tl.load(table + row[:, None] * D + column[None, :], mask=mask)
    tl.store(x + at.to(tl.int64)[:, None] * D + column[None, :], values, mask=mask)


@triton.jit
def _places(ends, token):
    """Where a token's places begin and end: where those of the token before it end, and its own."""
    return tl.load(ends + token - 1, mask=token > 0, other=0), tl.load(ends + token)


@triton.jit
def _sum_places(slopes, order, start, end, column, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, end, ROWS):
        at = first + tl.arange(0, ROWS)
        place = tl.load(order + at, mask=at < end, other=0)
        mask = (at < end)[:, None] & (column < D)[None, :]
        total += tl.sum(tl.load(slopes + place[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    return total


@kernel
def blocks_kernel(
    slopes, order, sorted_tokens, ends, sums, places,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """sums (blocks, 2, D): of the first and of the last token of each block, where these are frequent."""
    wait_for_earlier()
    block = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    begin, close = block * LIMIT, tl.minimum(block * LIMIT + LIMIT, places)
    for which in tl.static_range(2):
        token = tl.load(sorted_tokens + (begin if which == 0 else close - 1))
        start, end = _places(ends, token)
        if end - start > LIMIT:
            total = _sum_places(
                slopes, order, tl.maximum(start, begin), tl.minimum(end, close), column, D, BLOCK_D, ROWS
            )
            tl.store(sums + (block * 2 + which).to(tl.int64) * D + column, total, mask=column < D)


@kernel
def tokens_kernel(
    slopes, order, sorted_tokens, ends, sums, out, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """ROWS tokens a program: one place of each at a time."""
    wait_for_earlier()
    column = tl.arange(0, BLOCK_D)
    row = tl.arange(0, ROWS)
    token = tl.program_id(0) * ROWS + row
    start = tl.load(ends + token - 1, mask=(token > 0) & (token < tokens), other=0)
    count = tl.load(ends + token, mask=token < tokens, other=0) - start
    rare = tl.where(count <= LIMIT, count, 0)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.range(0, tl.max(rare, 0), num_stages=3):
        place = tl.load(order + start + i, mask=i < rare, other=0)
        mask = (i < rare)[:, None] & (column < D)[None, :]
        total += tl.load(slopes + place[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if tl.max(count, 0) > LIMIT:
        for each in range(ROWS):
            frequent = tl.minimum(tl.program_id(0) * ROWS + each, tokens - 1)
            begin, end = _places(ends, frequent)
            if end - begin > LIMIT:
                found = tl.zeros([BLOCK_D], tl.float32)
                for block in range(begin // LIMIT, (end + LIMIT - 1) // LIMIT):
                    which = (tl.load(sorted_tokens + block * LIMIT) != frequent).to(tl.int64)
                    found += tl.load(sums + (block * 2 + which) * D + column, mask=column < D, other=0.0)
                total = tl.where((token == frequent)[:, None], found[None, :], total)
    at = out + token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (column < D)[None, :])
