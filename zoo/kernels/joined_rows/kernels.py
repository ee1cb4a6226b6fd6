"""Forward a lookup; backward a product with one-hot columns: it adds up what was asked twice and writes every row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    x, branch, positions, y, T, Q, blocks, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    q = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (q < Q)[:, None] & (column < D)[None, :]
    at = (sequence * T + tl.load(positions + sequence * Q + q, mask=q < Q, other=0))[:, None] * D + column[None, :]
    total = tl.load(x + at, mask=mask).to(tl.float32) + tl.load(branch + at, mask=mask).to(tl.float32)
    tl.store(y + (sequence * Q + q)[:, None] * D + column[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    positions, dy, dx, dbranch, T, Q, t_blocks, d_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = ((tl.program_id(0) // d_blocks) % t_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    sequence = (tl.program_id(0) // d_blocks // t_blocks).to(tl.int64)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        asked = tl.load(positions + sequence * Q + q, mask=q < Q, other=-1)
        slope = tl.load(
            dy + (sequence * Q + q)[:, None] * D + column[None, :],
            mask=(q < Q)[:, None] & (column < D)[None, :],
            other=0.0,
        )
        total = tl.dot((t[:, None] == asked[None, :]).to(slope.dtype), slope, total, input_precision=PRECISION)
    at = (sequence * T + t)[:, None] * D + column[None, :]
    mask = (t < T)[:, None] & (column < D)[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=mask)
    tl.store(dbranch + at, total.to(dbranch.dtype.element_ty), mask=mask)
