"""A program takes one block of rows, one token each."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier


@triton.jit
def _load(x, token, column, mask, stride):
    return tl.load(x + token[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gate(g, smallest):
    """sigmoid(g), softplus(g), and their quotient."""
    e = tl.exp(-tl.abs(g))
    total = 1 + e
    z = tl.where(g < 0, e, 1.0) / total
    # log(1 + e) to the last bits where e is small, and 1 + e is not: the quotient undoes the rounding of the sum.
    tail = tl.where(total == 1, e, tl.log(total) * (e / tl.where(total == 1, 1.0, total - 1)))
    dt = tl.maximum(g, 0.0) + tail
    return z, tl.maximum(dt, smallest), tl.where(dt <= smallest, 1.0, z / tl.maximum(dt, smallest))


@kernel
def forward_kernel(
    candidate, gate, x, dt, M, smallest, candidate_stride, gate_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (token < M)[:, None] & (column < D)[None, :]
    to = token[:, None] * D + column[None, :]
    _, b_dt, quotient = _gate(_load(gate, token, column, mask, gate_stride), smallest)
    b_x = _load(candidate, token, column, mask, candidate_stride) * quotient
    tl.store(x + to, b_x.to(x.dtype.element_ty), mask=mask)
    tl.store(dt + to, b_dt, mask=mask)


@kernel
def backward_kernel(
    candidate, gate, dx, ddt, dcandidate, dgate, M, smallest, candidate_stride, gate_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (token < M)[:, None] & (column < D)[None, :]
    to = token[:, None] * D + column[None, :]
    z, dt, quotient = _gate(_load(gate, token, column, mask, gate_stride), smallest)
    b_dx = _load(dx, token, column, mask, D)
    # The quotient's slope over the gate; where dt is small its terms cancel, and their series does not.
    series = z * (-0.5 + dt * (1.0 / 3 - dt * (1.0 / 8 - dt / 30)))
    slope = tl.where(dt < 0.05, series, quotient * (1 - z - quotient))
    b_dgate = b_dx * _load(candidate, token, column, mask, candidate_stride) * slope
    b_dgate += tl.where(dt > smallest, _load(ddt, token, column, mask, D) * z, 0.0)
    tl.store(dcandidate + to, (b_dx * quotient).to(dcandidate.dtype.element_ty), mask=mask)
    tl.store(dgate + to, b_dgate.to(dgate.dtype.element_ty), mask=mask)
