"""All gradients in one launch: a program reads a block of the whole ones, and adds the rows that fall into it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_kernel(
    positions, dxs, drows, outs, T, Q, blocks,
    COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """outs[i] (B, T, D) = dxs[i] (B, T, D) and, at positions (B, Q), drows[i] (B, Q, D), in the order of Q."""
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    positions += sequence * Q
    inside = (column < D)[None, :]
    at = (sequence * T + t)[:, None] * D + column[None, :]
    mask = (t < T)[:, None] & inside
    count, place = tl.zeros([BLOCK_T], tl.int32), tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        asks = t[:, None] == tl.load(positions + q, mask=q < Q, other=-1).to(tl.int32)[None, :]
        count += tl.sum(asks.to(tl.int32), 1)
        place += tl.sum(tl.where(asks, q[None, :], 0), 1)
    several = tl.max(count, 0) > 1
    for i in tl.static_range(COUNT):
        rows = drows[i] + sequence * Q * D
        total = tl.load(dxs[i] + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(rows + place[:, None] * D + column[None, :], mask=(count == 1)[:, None] & inside, other=0.0)
        if several:
            for q in range(Q):
                asked = (count > 1) & (t == tl.load(positions + q))
                row = tl.load(rows + q * D + column, mask=column < D, other=0.0).to(tl.float32)
                total += tl.where(asked[:, None], row[None, :], 0.0)
        tl.store(outs[i] + at, total.to(outs[i].dtype.element_ty), mask=mask)
