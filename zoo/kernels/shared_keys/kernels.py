"""A program has a block of rows, one group of one token each, and all R heads of each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(rows, R: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """Rows, where their heads' steps are, and where their heads' channels are, each with what exists of it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, channel = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    steps = row[:, None] * R + head[None, :]
    steps_mask = (row < rows)[:, None] & (head < R)[None, :]
    keys = steps[:, :, None] * N + channel[None, None, :]
    return row, channel, steps, steps_mask, keys, steps_mask[:, :, None] & (channel < N)[None, None, :]


@triton.jit
def _shared(row, channel, rows, G, token_stride, group_stride, N: tl.constexpr):
    """Where the channels of a group's rows are in (tokens, G, N), with what exists of it."""
    at = (row // G) * token_stride + (row % G) * group_stride
    return at[:, None] + channel[None, :], (row < rows)[:, None] & (channel < N)[None, :]


@triton.jit
def forward_kernel(
    C, B, dt, q, k, rows, G, C_token, C_group, B_token, B_group,
    R: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, channel, steps, steps_mask, keys, keys_mask = _place(rows, R, N, BLOCK_R, BLOCK_N, ROWS)
    at, mask = _shared(row, channel, rows, G, C_token, C_group, N)
    b_q = tl.load(C + at, mask=mask, other=0.0)[:, None, :]
    at, mask = _shared(row, channel, rows, G, B_token, B_group, N)
    b_B = tl.load(B + at, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    b_dt = tl.load(dt + steps, mask=steps_mask, other=0.0).to(tl.float32)[:, :, None]
    tl.store(q + keys, tl.broadcast_to(b_q, [ROWS, BLOCK_R, BLOCK_N]), mask=keys_mask)
    tl.store(k + keys, (b_dt * b_B).to(k.dtype.element_ty), mask=keys_mask)


@triton.jit
def backward_kernel(
    B, dt, dq, dk, dC, dB, ddt, rows, G, B_token, B_group,
    R: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, channel, steps, steps_mask, keys, keys_mask = _place(rows, R, N, BLOCK_R, BLOCK_N, ROWS)
    at, mask = _shared(row, channel, rows, G, B_token, B_group, N)
    b_B = tl.load(B + at, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    b_dt = tl.load(dt + steps, mask=steps_mask, other=0.0).to(tl.float32)[:, :, None]
    b_dq = tl.load(dq + keys, mask=keys_mask, other=0.0).to(tl.float32)
    b_dk = tl.load(dk + keys, mask=keys_mask, other=0.0).to(tl.float32)
    to = row[:, None] * N + channel[None, :]
    tl.store(dC + to, tl.sum(b_dq, 1).to(dC.dtype.element_ty), mask=mask)
    tl.store(dB + to, tl.sum(b_dk * b_dt, 1).to(dB.dtype.element_ty), mask=mask)
    tl.store(ddt + steps, tl.sum(b_dk * b_B, 2).to(ddt.dtype.element_ty), mask=steps_mask)
