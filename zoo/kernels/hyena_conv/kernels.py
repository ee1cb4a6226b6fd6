"""Short convolutions and gates on the way to products that have time as their last axis, and on the way back.

A program has C tokens of one sequence and BLOCK channels, (C, BLOCK); a token's neighbours it loads again, which costs
no memory traffic. x1, x2, v, y are (B, T, D); u and s, the long convolution of u, are (B, D, T). weight (groups, 3, D,
W) and bias (groups, 3, D) have the parts of x1, x2 and v; so has parts (groups, programs, 3, W + 1, D), what each
program adds to their gradients.
"""

# Tuples grow by sums, because Triton has no star, and so change their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(T, per_group, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: group, sequence, tokens, channels, and its number among those with the same channels."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    part = tl.cast(tl.program_id(0) // blocks, tl.int64)
    chunks = tl.cdiv(T, C)
    b = part // chunks
    t = part % chunks * C + tl.arange(0, C)
    return b // per_group, b, t, d, part


@triton.jit
def _load(x, b, t, d, x_b, x_t, T, D: tl.constexpr):
    mask = ((t >= 0) & (t < T))[:, None] & (d < D)[None, :]
    return tl.load(x + b * x_b + t[:, None] * x_t + d[None, :], mask=mask, other=0.0)


@triton.jit
def _load_turned(x, b, t, d, T, D: tl.constexpr):
    at = x + (b * D + d[:, None]) * T + t[None, :]
    return tl.trans(tl.load(at, mask=(d < D)[:, None] & (t < T)[None, :], other=0.0)).to(tl.float32)


@triton.jit
def _store(y, values, b, t, d, T, D: tl.constexpr):
    at = y + (b * T + t[:, None]) * D + d[None, :]
    tl.store(at, values.to(y.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :])


@triton.jit
def _store_turned(y, values, b, t, d, T, D: tl.constexpr):
    at = y + (b * D + d[:, None]) * T + t[None, :]
    tl.store(at, tl.trans(values.to(y.dtype.element_ty)), mask=(d < D)[:, None] & (t < T)[None, :])


@triton.jit
def _taps(weight, bias, row, d, D: tl.constexpr, W: tl.constexpr):
    """What x_{t-W+1}, ..., x_t are multiplied by, and the bias, of one of the rows (groups, 3)."""
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight + (row * D + d) * W + j, mask=d < D, other=0.0).to(tl.float32)[None, :],)
    return taps, tl.load(bias + row * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _inputs(x, b, t, d, x_b, x_t, T, D: tl.constexpr, W: tl.constexpr, AHEAD: tl.constexpr):
    """x at t - W + 1, ..., t + AHEAD."""
    seen = ()
    for i in tl.static_range(W + AHEAD):
        seen = seen + (_load(x, b, t + (i - (W - 1)), d, x_b, x_t, T, D),)
    return seen


@triton.jit
def _convolved(seen, taps, bias, ahead: tl.constexpr, W: tl.constexpr):
    """The short convolution at t + ahead."""
    total = bias + taps[0] * seen[ahead].to(tl.float32)
    for j in tl.static_range(1, W):
        total += taps[j] * seen[ahead + j].to(tl.float32)
    return total


@triton.jit
def _store_parts(parts, seen, slope, part, which: tl.constexpr, d, D: tl.constexpr, W: tl.constexpr):
    parts += (part * 3 + which) * (W + 1) * D + d
    for j in tl.static_range(W):
        tl.store(parts + j * D, tl.sum(slope * seen[j].to(tl.float32), 0), mask=d < D)
    tl.store(parts + W * D, tl.sum(slope, 0), mask=d < D)


@triton.jit
def enter_kernel(
    x1, v, weight, bias, u, T, per_group, x1_b, x1_t, v_b, v_t,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u = c1(x1) * c3(v)."""
    group, b, t, d, _ = _place(T, per_group, D, C, BLOCK)
    taps_1, bias_1 = _taps(weight, bias, group * 3, d, D, W)
    taps_3, bias_3 = _taps(weight, bias, group * 3 + 2, d, D, W)
    c1 = _convolved(_inputs(x1, b, t, d, x1_b, x1_t, T, D, W, 0), taps_1, bias_1, 0, W)
    c3 = _convolved(_inputs(v, b, t, d, v_b, v_t, T, D, W, 0), taps_3, bias_3, 0, W)
    _store_turned(u, c1 * c3, b, t, d, T, D)


@triton.jit
def leave_kernel(
    x2, s, weight, bias, y, T, per_group, x2_b, x2_t,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = c2(x2) * s."""
    group, b, t, d, _ = _place(T, per_group, D, C, BLOCK)
    taps, b_bias = _taps(weight, bias, group * 3 + 1, d, D, W)
    c2 = _convolved(_inputs(x2, b, t, d, x2_b, x2_t, T, D, W, 0), taps, b_bias, 0, W)
    _store(y, c2 * _load_turned(s, b, t, d, T, D), b, t, d, T, D)


@triton.jit
def leave_backward_kernel(
    dy, x2, s, weight, bias, ds, dx2, parts, T, per_group, dy_b, dy_t, x2_b, x2_t,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ds = c2(x2) * dy; a token's dx2 comes from the gates at it and at the W - 1 tokens that follow."""
    group, b, t, d, part = _place(T, per_group, D, C, BLOCK)
    taps, b_bias = _taps(weight, bias, group * 3 + 1, d, D, W)
    seen = _inputs(x2, b, t, d, x2_b, x2_t, T, D, W, 0)
    b_dy = _load(dy, b, t, d, dy_b, dy_t, T, D).to(tl.float32)
    _store_turned(ds, _convolved(seen, taps, b_bias, 0, W) * b_dy, b, t, d, T, D)
    slope = b_dy * _load_turned(s, b, t, d, T, D)
    _store_parts(parts, seen, slope, part, 1, d, D, W)
    total = taps[W - 1] * slope
    for a in tl.static_range(1, W):
        later = _load(dy, b, t + a, d, dy_b, dy_t, T, D).to(tl.float32) * _load_turned(s, b, t + a, d, T, D)
        total += taps[W - 1 - a] * later
    _store(dx2, total, b, t, d, T, D)


@triton.jit
def enter_backward_kernel(
    du, x1, v, weight, bias, dx1, dv, parts, T, per_group, x1_b, x1_t, v_b, v_t,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of x1 and v, as that of x2 above."""
    group, b, t, d, part = _place(T, per_group, D, C, BLOCK)
    taps_1, bias_1 = _taps(weight, bias, group * 3, d, D, W)
    taps_3, bias_3 = _taps(weight, bias, group * 3 + 2, d, D, W)
    seen_1 = _inputs(x1, b, t, d, x1_b, x1_t, T, D, W, W - 1)
    seen_3 = _inputs(v, b, t, d, v_b, v_t, T, D, W, W - 1)
    total_1 = tl.zeros((C, BLOCK), tl.float32)
    total_3 = tl.zeros((C, BLOCK), tl.float32)
    for a in tl.static_range(W):
        b_du = _load_turned(du, b, t + a, d, T, D)
        slope_1 = b_du * _convolved(seen_3, taps_3, bias_3, a, W)
        slope_3 = b_du * _convolved(seen_1, taps_1, bias_1, a, W)
        if a == 0:
            _store_parts(parts, seen_1, slope_1, part, 0, d, D, W)
            _store_parts(parts, seen_3, slope_3, part, 2, d, D, W)
        total_1 += taps_1[W - 1 - a] * slope_1
        total_3 += taps_3[W - 1 - a] * slope_3
    _store(dx1, total_1, b, t, d, T, D)
    _store(dv, total_3, b, t, d, T, D)
