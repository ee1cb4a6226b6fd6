"""A program takes blocks of rows, one token each."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier

SOFTPLUS, LOGSIGMOID, SIGMOID, EXP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _load(x, group, token, column, mask, g, m):
    row = group.to(tl.int64) * g + token.to(tl.int64) * m
    return tl.load(x + row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def softplus(u):
    # log(1 + e) to the last bits where e is small, and 1 + e is not: the quotient undoes the rounding of the sum.
    e = tl.exp(-tl.abs(u))
    total = 1 + e
    return tl.maximum(u, 0.0) + tl.where(total == 1, e, tl.log(total) * (e / tl.where(total == 1, 1.0, total - 1)))


@kernel
def forward_kernel(
    x, bias, y, M, steps, parts, scale, x_g, x_m,
    KIND: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    column = tl.arange(0, BLOCK_D)
    b_bias = tl.load(bias + group * D + column, mask=column < D, other=0.0).to(tl.float32)
    for step in range(steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (token < M)[:, None] & (column < D)[None, :]
        u = _load(x, group, token, column, mask, x_g, x_m) + b_bias[None, :]
        if KIND == SOFTPLUS:
            out = softplus(u)
        elif KIND == LOGSIGMOID:
            out = -softplus(-u)
        elif KIND == SIGMOID:
            out = tl.sigmoid(u)
        else:
            out = tl.exp(u)
        tl.store(y + ((group.to(tl.int64) * M + token) * D)[:, None] + column[None, :], out * scale, mask=mask)


@kernel
def backward_kernel(
    x, bias, dy, dx, sums, M, steps, parts, scale, x_g, x_m, dy_g, dy_m,
    KIND: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sums (groups, parts, D): the gradient of the bias, summed over a program's rows."""
    wait_for_earlier()
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    column = tl.arange(0, BLOCK_D)
    b_bias = tl.load(bias + group * D + column, mask=column < D, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in range(steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (token < M)[:, None] & (column < D)[None, :]
        u = _load(x, group, token, column, mask, x_g, x_m) + b_bias[None, :]
        slope = _load(dy, group, token, column, mask, dy_g, dy_m) * scale
        if KIND == SOFTPLUS:
            slope *= tl.sigmoid(u)
        elif KIND == LOGSIGMOID:
            slope *= tl.sigmoid(-u)
        elif KIND == SIGMOID:
            slope *= tl.sigmoid(u) * tl.sigmoid(-u)
        else:
            slope *= tl.exp(u)
        dbias += slope
        to = dx + ((group.to(tl.int64) * M + token) * D)[:, None] + column[None, :]
        tl.store(to, slope.to(dx.dtype.element_ty), mask=mask)
    tl.store(sums + tl.program_id(0) * D + column, tl.sum(dbias, 0), mask=column < D)
