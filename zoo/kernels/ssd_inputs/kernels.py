"""A program takes blocks of tokens, one group of heads of each, and all R heads of that group."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.activation.kernels import softplus
from zoo.kernels.early import kernel, wait_for_earlier


@triton.jit
def _shared(x, member, token, g, m_stride, t_stride, g_stride, n, live, N: tl.constexpr):
    """Channels of the group, the same for its heads: (ROWS, 1, BLOCK_N)."""
    at = (member * m_stride + token.to(tl.int64) * t_stride + g * g_stride)[:, None] + n[None, :]
    return tl.load(x + at, mask=live[:, None] & (n < N)[None, :], other=0.0)[:, None, :]


@kernel
def forward_kernel(
    BC, dt, bias, log_A, q, k, decay, M, G, steps, parts, BC_m, BC_t, BC_s, BC_g, dt_m, dt_t,
    R: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """BC (members, M, 2, G, N), dt (members, M, G R), bias and log_A (members, G R)."""
    wait_for_earlier()
    part, which = tl.program_id(0) % parts, tl.program_id(0) // parts
    member, g = (which // G).to(tl.int64), which % G
    r, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    b_bias = tl.load(bias + which.to(tl.int64) * R + r, mask=r < R, other=0.0).to(tl.float32)
    b_A = -tl.exp(tl.load(log_A + which.to(tl.int64) * R + r, mask=r < R, other=0.0).to(tl.float32))
    for step in range(steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        live = token < M
        heads_mask = live[:, None] & (r < R)[None, :]
        at = (member * dt_m + token.to(tl.int64) * dt_t + g * R)[:, None] + r[None, :]
        b_dt = softplus(tl.load(dt + at, mask=heads_mask, other=0.0).to(tl.float32) + b_bias[None, :])
        heads = ((member * M + token) * G * R + g * R)[:, None] + r[None, :]
        tl.store(decay + heads, b_dt * b_A[None, :], mask=heads_mask)
        keys = heads[:, :, None] * N + n[None, None, :]
        mask = heads_mask[:, :, None] & (n < N)[None, None, :]
        b_B = _shared(BC, member, token, g, BC_m, BC_t, BC_g, n, live, N).to(tl.float32)
        b_C = _shared(BC + BC_s, member, token, g, BC_m, BC_t, BC_g, n, live, N)
        tl.store(q + keys, tl.broadcast_to(b_C, [ROWS, BLOCK_R, BLOCK_N]), mask=mask)
        tl.store(k + keys, (b_dt[:, :, None] * b_B).to(k.dtype.element_ty), mask=mask)


@kernel
def backward_kernel(
    BC, dt, bias, log_A, dq, dk, ddecay, dBC, ddt, dbias, dlog_A, M, G, steps, parts, BC_m, BC_t, BC_g, dt_m, dt_t,
    R: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dbias and dlog_A (members G, parts, R): sums over a program's tokens."""
    wait_for_earlier()
    part, which = tl.program_id(0) % parts, tl.program_id(0) // parts
    member, g = (which // G).to(tl.int64), which % G
    r, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    b_bias = tl.load(bias + which.to(tl.int64) * R + r, mask=r < R, other=0.0).to(tl.float32)
    b_A = -tl.exp(tl.load(log_A + which.to(tl.int64) * R + r, mask=r < R, other=0.0).to(tl.float32))
    sum_bias, sum_A = tl.zeros([ROWS, BLOCK_R], tl.float32), tl.zeros([ROWS, BLOCK_R], tl.float32)
    for step in range(steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        live = token < M
        heads_mask = live[:, None] & (r < R)[None, :]
        at = (member * dt_m + token.to(tl.int64) * dt_t + g * R)[:, None] + r[None, :]
        u = tl.load(dt + at, mask=heads_mask, other=0.0).to(tl.float32) + b_bias[None, :]
        b_dt = softplus(u)
        heads = ((member * M + token) * G * R + g * R)[:, None] + r[None, :]
        keys = heads[:, :, None] * N + n[None, None, :]
        mask = heads_mask[:, :, None] & (n < N)[None, None, :]
        b_B = _shared(BC, member, token, g, BC_m, BC_t, BC_g, n, live, N).to(tl.float32)
        b_dk = tl.load(dk + keys, mask=mask, other=0.0).to(tl.float32)
        b_dq = tl.load(dq + keys, mask=mask, other=0.0).to(tl.float32)
        b_ddecay = tl.load(ddecay + heads, mask=heads_mask, other=0.0)
        slope = (tl.sum(b_dk * b_B, 2) + b_ddecay * b_A[None, :]) * tl.sigmoid(u)
        tl.store(ddt + heads, slope.to(ddt.dtype.element_ty), mask=heads_mask)
        sum_bias += tl.where(heads_mask, slope, 0.0)
        sum_A += b_ddecay * b_dt * b_A[None, :]
        shared = (((member * M + token) * 2 * G + g) * N)[:, None] + n[None, :]
        shared_mask = live[:, None] & (n < N)[None, :]
        tl.store(dBC + shared, tl.sum(b_dk * b_dt[:, :, None], 1).to(dBC.dtype.element_ty), mask=shared_mask)
        tl.store(dBC + G * N + shared, tl.sum(b_dq, 1).to(dBC.dtype.element_ty), mask=shared_mask)
    to = tl.program_id(0) * R + r
    tl.store(dbias + to, tl.sum(sum_bias, 0), mask=r < R)
    tl.store(dlog_A + to, tl.sum(sum_A, 0), mask=r < R)
