"""A program takes blocks of rows, one head of one token each; a row stays in registers from its loads to its store.

Where the weights differ by head, a program has one head, else its rows are of all heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.short_conv.kernels import sigmoid


@triton.jit
def _load(x, group, token, head, column, live, g, m, h, V: tl.constexpr):
    """Rows of x (groups, M, H, V), whose strides are g, m, h and 1; zeros where there is none."""
    row = group.to(tl.int64) * g + token.to(tl.int64) * m + head * h
    mask = live[:, None] & (column < V)[None, :]
    return tl.load(x + row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(weight, at, column, V: tl.constexpr):
    return tl.load(weight + at * V + column, mask=column < V, other=0.0).to(tl.float32)


@triton.jit
def _store(x, values, group, token, head, column, live, M, H: tl.constexpr, V: tl.constexpr):
    row = ((group.to(tl.int64) * M + token) * H + head) * V
    mask = live[:, None] & (column < V)[None, :]
    tl.store(x + row[:, None] + column[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _standardised(u, column, eps, RMS: tl.constexpr, V: tl.constexpr):
    """Rows of mean 0 (unless RMS) and mean square 1, and what they were divided by, inverted."""
    if not RMS:
        u = tl.where((column < V)[None, :], u - (tl.sum(u, 1) / V)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(u * u, 1) / V + eps)
    return u * inverse[:, None], inverse


@kernel
def forward_kernel(
    x, gate, weight, bias, y, M, steps, parts, scale, eps,
    x_g, x_m, x_h, gate_g, gate_m, gate_h,
    GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    RMS: tl.constexpr, GATE_FIRST: tl.constexpr,
    H: tl.constexpr, HEADS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """HEADS: how many heads have weights of their own, H or 1."""
    wait_for_earlier()
    at, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    group = at // HEADS
    column = tl.arange(0, BLOCK_V)
    factor = tl.full([BLOCK_V], 1.0, tl.float32) * scale
    if WEIGHT:
        factor *= _load_weight(weight, at, column, V)
    for step in range(steps):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        token, head = (row // H, row % H) if HEADS == 1 else (row, row * 0 + at % HEADS)
        live = token < M
        u = _load(x, group, token, head, column, live, x_g, x_m, x_h, V)
        if GATE:
            z = _load(gate, group, token, head, column, live, gate_g, gate_m, gate_h, V)
            opened = z * sigmoid(z)
            if GATE_FIRST:
                u *= opened
        unit, _ = _standardised(u, column, eps, RMS, V)
        out = unit * factor[None, :]
        if BIAS:
            out += _load_weight(bias, at, column, V)[None, :]
        if GATE and not GATE_FIRST:
            out *= opened
        _store(y, out, group, token, head, column, live, M, H, V)


@kernel
def backward_kernel(
    x, gate, weight, bias, dy, dx, dgate, weight_sums, bias_sums,
    M, steps, parts, scale, eps,
    x_g, x_m, x_h, gate_g, gate_m, gate_h, dy_g, dy_m, dy_h,
    GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    RMS: tl.constexpr, GATE_FIRST: tl.constexpr,
    H: tl.constexpr, HEADS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """weight_sums and bias_sums (groups * HEADS, parts, V): gradients, summed over a program's rows."""
    wait_for_earlier()
    at, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    group = at // HEADS
    column = tl.arange(0, BLOCK_V)
    factor = tl.full([BLOCK_V], 1.0, tl.float32) * scale
    if WEIGHT:
        factor *= _load_weight(weight, at, column, V)
    zeros = tl.zeros([ROWS, BLOCK_V], tl.float32)
    dweight, dbias = zeros, zeros
    for step in range(steps):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        token, head = (row // H, row % H) if HEADS == 1 else (row, row * 0 + at % HEADS)
        live = token < M
        # All loads before the first sum, which would hold them up.
        u = _load(x, group, token, head, column, live, x_g, x_m, x_h, V)
        slope = _load(dy, group, token, head, column, live, dy_g, dy_m, dy_h, V)
        ungated = u
        if GATE:
            z = _load(gate, group, token, head, column, live, gate_g, gate_m, gate_h, V)
            opening = sigmoid(z)
            opened = z * opening
            if GATE_FIRST:
                u *= opened
        unit, inverse = _standardised(u, column, eps, RMS, V)
        if GATE and not GATE_FIRST:
            normed = unit * factor[None, :]
            if BIAS:
                normed += _load_weight(bias, at, column, V)[None, :]
            dz = slope * normed
            slope *= opened
        if WEIGHT:
            dweight += slope * unit
        if BIAS:
            dbias += slope
        slope *= factor[None, :]
        change = slope - unit * (tl.sum(slope * unit, 1) / V)[:, None]
        if not RMS:
            change -= (tl.sum(slope, 1) / V)[:, None]
        change *= inverse[:, None]
        if GATE:
            if GATE_FIRST:
                dz = change * ungated
                change *= opened
            dz *= opening + opened * (1 - opening)
            _store(dgate, dz, group, token, head, column, live, M, H, V)
        _store(dx, change, group, token, head, column, live, M, H, V)
    to = tl.program_id(0) * V + column
    if WEIGHT:
        tl.store(weight_sums + to, tl.sum(dweight, 0) * scale, mask=column < V)
    if BIAS:
        tl.store(bias_sums + to, tl.sum(dbias, 0), mask=column < V)
