"""All gradients in one launch: a program reads a block of the whole ones, and adds the rows that fall into it."""

from __future__ import annotations

import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.gather_rows.kernels import add_of_several, askers


@kernel
def add_kernel(
    positions, dxs, drows, outs, T, Q, blocks,
    COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """outs[i] (B, T, D) = dxs[i] (B, T, D) and, at positions (B, Q), drows[i] (B, Q, D), in the order of Q."""
    wait_for_earlier()
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    positions += sequence * Q
    inside = (column < D)[None, :]
    at = (sequence * T + t)[:, None] * D + column[None, :]
    mask = (t < T)[:, None] & inside
    count, place = askers(positions, t, Q, BLOCK_T, BLOCK_Q)
    several = tl.max(count, 0) > 1
    for i in tl.static_range(COUNT):
        rows = drows[i] + sequence * Q * D
        total = tl.load(dxs[i] + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(rows + place[:, None] * D + column[None, :], mask=(count == 1)[:, None] & inside, other=0.0)
        if several:
            total = add_of_several(total, rows, positions, t, count, Q, column, D)
        tl.store(outs[i] + at, total.to(outs[i].dtype.element_ty), mask=mask)
