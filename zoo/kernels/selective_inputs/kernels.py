"""Both products each way in one pass: what lies between them, R + 2 N numbers a token, stays in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import block_of_rows, load_masked, store_masked


@triton.jit
def _steps(dt_weight, n, d, D, R: tl.constexpr):
    """The transpose of dt_weight (D, R), with zeros in the rows n of B and C."""
    return tl.load(dt_weight + d[None, :] * R + n[:, None], mask=(n < R)[:, None] & (d < D)[None, :], other=0.0)


@kernel
def forward_kernel(
    x, weight, dt_weight, y, dt, M, D, x_group, x_row, row_blocks,
    R: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (groups, M, WIDTH), of which N are used, = weight x; dt (groups, M, D) = dt_weight y[:R]."""
    wait_for_earlier()
    group, start_row, within, live = block_of_rows(M, row_blocks, ROWS)
    n = tl.arange(0, BLOCK_N)
    first = group * M + start_row
    x += group * x_group + start_row.to(tl.int64) * x_row
    weight += group * N * D
    dt_weight += group * D * R
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in tl.range(0, D, BLOCK, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK)
        x_MD = load_masked(x, within, x_row, live, d, d < D)
        w_ND = load_masked(weight, n, D, n < N, d, d < D).to(x_MD.dtype)
        total = tl.dot(x_MD, tl.trans(w_ND), total, input_precision=PRECISION)
    y_MN = total.to(y.dtype.element_ty)
    store_masked(y + first * WIDTH, y_MN, within, WIDTH, live, n, n < WIDTH)
    dt += first * D
    for start in tl.range(0, D, BLOCK, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK)
        steps = tl.dot(y_MN, _steps(dt_weight, n, d, D, R).to(y_MN.dtype), input_precision=PRECISION)
        at = within[:, None] * D + d[None, :]
        tl.store(dt + at, steps.to(dt.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@kernel
def input_kernel(
    dkept, ddt, dB, dC, weight, dt_weight, dx, dy, M, D, row_blocks,
    R: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy (groups, M, WIDTH) = dt_weight^T ddt, dB and dC side by side; dx (groups, M, D) = dkept + weight^T dy."""
    wait_for_earlier()
    group, start_row, within, live = block_of_rows(M, row_blocks, ROWS)
    n = tl.arange(0, BLOCK_N)
    first = group * M + start_row
    weight += group * N * D
    dt_weight += group * D * R
    ddt += first * D
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in tl.range(0, D, BLOCK, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK)
        ddt_MD = load_masked(ddt, within, D, live, d, d < D)
        steps = _steps(dt_weight, n, d, D, R).to(ddt_MD.dtype)
        total = tl.dot(ddt_MD, tl.trans(steps), total, input_precision=PRECISION)
    is_B = live[:, None] & ((n >= R) & (n < R + STATES))[None, :]
    is_C = live[:, None] & ((n >= R + STATES) & (n < N))[None, :]
    state = within[:, None] * STATES + (n - R)[None, :]
    total += tl.load(dB + first * STATES + state, mask=is_B, other=0.0).to(tl.float32)
    total += tl.load(dC + first * STATES + state - STATES, mask=is_C, other=0.0).to(tl.float32)
    dy_MN = total.to(dy.dtype.element_ty)
    store_masked(dy + first * WIDTH, dy_MN, within, WIDTH, live, n, n < WIDTH)
    dkept += first * D
    dx += first * D
    for start in tl.range(0, D, BLOCK, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK)
        at = within[:, None] * D + d[None, :]
        mask = live[:, None] & (d < D)[None, :]
        slope = tl.load(dkept + at, mask=mask, other=0.0).to(tl.float32)
        w_ND = load_masked(weight, n, D, n < N, d, d < D).to(dy_MN.dtype)
        slope = tl.dot(dy_MN, w_ND, slope, input_precision=PRECISION)
        tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=mask)
