"""Forward a lookup; backward every row is written once: zeros, or the slope of the place that asked for it.

Where several did, a program goes through all places once more and adds theirs up in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier


@triton.jit
def askers(positions, t, Q, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr):
    """For the tokens t (BLOCK_T), how many of positions (Q) ask for each, and at which place, if it is one."""
    count, place = tl.zeros([BLOCK_T], tl.int32), tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        asks = t[:, None] == tl.load(positions + q, mask=q < Q, other=-1).to(tl.int32)[None, :]
        count += tl.sum(asks.to(tl.int32), 1)
        place += tl.sum(tl.where(asks, q[None, :], 0), 1)
    return count, place


@triton.jit
def add_of_several(total, rows, positions, t, count, Q, column, D: tl.constexpr):
    """total, and for tokens t that several of positions (Q) ask for, their rows (Q, D) in the order of Q."""
    for q in range(Q):
        asked = (count > 1) & (t == tl.load(positions + q))
        row = tl.load(rows + q * D + column, mask=column < D, other=0.0).to(tl.float32)
        total += tl.where(asked[:, None], row[None, :], 0.0)
    return total


@triton.jit
def scattered(rows, positions, t, Q, column, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr):
    """For tokens t (BLOCK_T) the sum of those of the rows (Q, D) whose positions (Q) ask for them, in fp32."""
    count, place = askers(positions, t, Q, BLOCK_T, BLOCK_Q)
    mask = (count == 1)[:, None] & (column < D)[None, :]
    total = tl.load(rows + place[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if tl.max(count, 0) > 1:
        total = add_of_several(total, rows, positions, t, count, Q, column, D)
    return total


@kernel
def forward_kernel(
    x, positions, y, Q, blocks, x_b, x_t, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    q = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (q < Q)[:, None] & (column < D)[None, :]
    t = tl.load(positions + sequence * Q + q, mask=q < Q, other=0)
    rows = tl.load(x + (sequence * x_b + t * x_t)[:, None] + column[None, :], mask=mask)
    tl.store(y + (sequence * Q + q)[:, None] * D + column[None, :], rows, mask=mask)


@kernel
def backward_kernel(
    positions, dy, dx, T, Q, t_blocks, d_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    column = (tl.program_id(0) % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = ((tl.program_id(0) // d_blocks) % t_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    sequence = (tl.program_id(0) // d_blocks // t_blocks).to(tl.int64)
    total = scattered(dy + sequence * Q * D, positions + sequence * Q, t, Q, column, D, BLOCK_T, BLOCK_Q)
    at = (sequence * T + t)[:, None] * D + column[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(t < T)[:, None] & (column < D)[None, :])
