"""Short convolutions and gates on the way to products that have time as their last axis, and on the way back.

A program has C tokens of one sequence and BLOCK channels, (C, BLOCK); a token's neighbours it loads again, which costs
no memory traffic. x1, x2, v, y, du are (B, T, D); u and s, the long convolution of u, are (B, D, T). weight (groups, 3,
D, W) and bias (groups, 3, D) have the parts of x1, x2 and v. parts (groups, programs, 1 or 2, W + 1, D): what each
program adds to the gradients of the part of x2, or of those of x1 and v.
"""

# Tuples grow by sums, because Triton has no star, and so change their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.short_conv.kernels import convolve, gradients_at, load_at, load_taps, place


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
    """The taps and the bias of one of the rows (groups, 3)."""
    b_bias = tl.load(bias + row * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return load_taps(weight + row * D * W, d, D, W), b_bias


@triton.jit
def _inputs(x, b, t, d, x_b, x_t, T, D: tl.constexpr, W: tl.constexpr):
    """x at t - W + 1, ..., t."""
    seen = ()
    for i in tl.static_range(W):
        seen = seen + (_load(x, b, t + (i - (W - 1)), d, x_b, x_t, T, D),)
    return seen


@triton.jit
def _store_parts(parts, seen, slope, part, d, D: tl.constexpr, W: tl.constexpr):
    parts += part * (W + 1) * D + d
    for j in tl.static_range(W):
        tl.store(parts + j * D, tl.sum(slope * seen[j].to(tl.float32), 0), mask=d < D)
    tl.store(parts + W * D, tl.sum(slope, 0), mask=d < D)


@kernel
def enter_kernel(
    x1, v, weight, bias, u, T, per_group, x1_b, x1_t, v_b, v_t,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u = c1(x1) * c3(v)."""
    wait_for_earlier()
    group, b, t, d, _ = _place(T, per_group, D, C, BLOCK)
    taps_1, bias_1 = _taps(weight, bias, group * 3, d, D, W)
    taps_3, bias_3 = _taps(weight, bias, group * 3 + 2, d, D, W)
    c1 = convolve(_inputs(x1, b, t, d, x1_b, x1_t, T, D, W), taps_1, bias_1, 0, W)
    c3 = convolve(_inputs(v, b, t, d, v_b, v_t, T, D, W), taps_3, bias_3, 0, W)
    _store_turned(u, c1 * c3, b, t, d, T, D)


@kernel
def leave_kernel(
    x2, s, weight, bias, y, T, per_group, x2_b, x2_t,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = c2(x2) * s."""
    wait_for_earlier()
    group, b, t, d, _ = _place(T, per_group, D, C, BLOCK)
    taps, b_bias = _taps(weight, bias, group * 3 + 1, d, D, W)
    c2 = convolve(_inputs(x2, b, t, d, x2_b, x2_t, T, D, W), taps, b_bias, 0, W)
    _store(y, c2 * _load_turned(s, b, t, d, T, D), b, t, d, T, D)


@kernel
def leave_backward_kernel(
    dy, x2, s, weight, bias, ds, dx2, parts, T, per_group, dy_b, dy_t, x2_b, x2_t,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ds = c2(x2) * dy; a token's dx2 comes from the gates at it and at the W - 1 tokens that follow."""
    wait_for_earlier()
    group, b, t, d, part = _place(T, per_group, D, C, BLOCK)
    taps, b_bias = _taps(weight, bias, group * 3 + 1, d, D, W)
    seen = _inputs(x2, b, t, d, x2_b, x2_t, T, D, W)
    b_dy = _load(dy, b, t, d, dy_b, dy_t, T, D).to(tl.float32)
    _store_turned(ds, convolve(seen, taps, b_bias, 0, W) * b_dy, b, t, d, T, D)
    slope = b_dy * _load_turned(s, b, t, d, T, D)
    _store_parts(parts, seen, slope, part, d, D, W)
    total = taps[W - 1] * slope
    for a in tl.static_range(1, W):
        later = _load(dy, b, t + a, d, dy_b, dy_t, T, D).to(tl.float32) * _load_turned(s, b, t + a, d, T, D)
        total += taps[W - 1 - a] * later
    _store(dx2, total, b, t, d, T, D)


@kernel
def enter_backward_kernel(
    du, x1, v, weight, bias, dx1, dv, parts, T, per_group, x1_b, x1_t, v_b, v_t,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The gradients of x1 and v: a walk through chunks of C tokens, ROWS of them side by side, as in `short_conv`."""
    wait_for_earlier()
    group, b, chunk, live, d, part = place(per_group, tl.cdiv(T, C), D, BLOCK, ROWS)
    start = chunk * C
    x1 += (b * x1_b + start * x1_t)[:, None] + d[None, :]
    v += (b * v_b + start * v_t)[:, None] + d[None, :]
    own = ((b * T + start) * D)[:, None] + d[None, :]
    taps_1, bias_1 = _taps(weight, bias, group * 3, d, D, W)
    taps_3, bias_3 = _taps(weight, bias, group * 3 + 2, d, D, W)
    seen_1 = ()
    seen_3 = ()
    for i in tl.static_range(W - 1):
        t = i - (W - 1)
        seen_1 = seen_1 + (load_at(x1 + t * x1_t, start + t, live, d, T, D, BLOCK),)
        seen_3 = seen_3 + (load_at(v + t * v_t, start + t, live, d, T, D, BLOCK),)
    slopes_1 = ()
    slopes_3 = ()
    for i in tl.static_range(W - 1):
        seen_1 = seen_1 + (load_at(x1 + i * x1_t, start + i, live, d, T, D, BLOCK),)
        seen_3 = seen_3 + (load_at(v + i * v_t, start + i, live, d, T, D, BLOCK),)
        b_du = load_at(du + own + i * D, start + i, live, d, T, D, BLOCK).to(tl.float32)
        slopes_1 = slopes_1 + (b_du * convolve(seen_3, taps_3, bias_3, 0, W),)
        slopes_3 = slopes_3 + (b_du * convolve(seen_1, taps_1, bias_1, 0, W),)
        seen_1 = seen_1[1:]
        seen_3 = seen_3[1:]
    dtaps_1 = ()
    dtaps_3 = ()
    for _ in tl.static_range(W + 1):
        dtaps_1 = dtaps_1 + (tl.zeros((ROWS, BLOCK), tl.float32),)
        dtaps_3 = dtaps_3 + (tl.zeros((ROWS, BLOCK), tl.float32),)
    for at in range(0, C, STEPS):
        given = ()
        for i in tl.static_range(STEPS):
            t = at + (i + W - 1)
            b_x1 = load_at(x1 + t * x1_t, start + t, live, d, T, D, BLOCK)
            b_v = load_at(v + t * v_t, start + t, live, d, T, D, BLOCK)
            given = given + ((b_x1, b_v, load_at(du + own + t * D, start + t, live, d, T, D, BLOCK)),)
        for i in tl.static_range(STEPS):
            seen_1 = seen_1 + (given[i][0],)
            seen_3 = seen_3 + (given[i][1],)
            b_du = given[i][2].to(tl.float32)
            slopes_1 = slopes_1 + (b_du * convolve(seen_3, taps_3, bias_3, 0, W),)
            slopes_3 = slopes_3 + (b_du * convolve(seen_1, taps_1, bias_1, 0, W),)
            b_dx1, dtaps_1 = gradients_at(seen_1[0].to(tl.float32), slopes_1, taps_1, dtaps_1, W)
            b_dv, dtaps_3 = gradients_at(seen_3[0].to(tl.float32), slopes_3, taps_3, dtaps_3, W)
            mask = (live & (start + (at + i) < T))[:, None] & (d < D)[None, :]
            tl.store(dx1 + own + (at + i) * D, b_dx1.to(dx1.dtype.element_ty), mask=mask)
            tl.store(dv + own + (at + i) * D, b_dv.to(dv.dtype.element_ty), mask=mask)
            seen_1 = seen_1[1:]
            seen_3 = seen_3[1:]
            slopes_1 = slopes_1[1:]
            slopes_3 = slopes_3[1:]
    parts += part * 2 * (W + 1) * D + d
    for j in tl.static_range(W + 1):
        row = W - 1 - j if j < W else W
        tl.store(parts + row * D, tl.sum(dtaps_1[j], 0), mask=d < D)
        tl.store(parts + (W + 1 + row) * D, tl.sum(dtaps_3[j], 0), mask=d < D)
