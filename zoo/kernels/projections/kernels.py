"""Products of one tall matrix with several small ones: a program has a block of its rows, and meets all of them."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import block_of_rows, load_masked, store_masked


@kernel
def cast_kernel(weights, outs, weight_groups, sizes, groups, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """outs[i] (groups, sizes[i]) = weights[i], whose groups are weight_groups[i] apart, in the dtype of outs[i]."""
    wait_for_earlier()
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (program >= 0) & (program < groups * blocks):
            group = (program // blocks).to(tl.int64)
            at = program % blocks * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(weights[i] + group * weight_groups[i] + at, mask=at < sizes[i])
            tl.store(outs[i] + group * sizes[i] + at, values.to(outs[i].dtype.element_ty), mask=at < sizes[i])
        program -= groups * blocks


@triton.jit
def _multiply(
    x_MK, weight, bias, y, within, k, live,
    BIAS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK)
        w_NK = load_masked(weight, n, K, n < N, k, k < K).to(x_MK.dtype)
        y_MN = tl.dot(x_MK, tl.trans(w_NK), input_precision=PRECISION)
        if BIAS:
            y_MN += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        store_masked(y, y_MN, within, N, live, n, n < N)


@triton.jit
def _add_product(
    total, dy, weight, within, k, live,
    N: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK)
        dy_MN = load_masked(dy, within, N, live, n, n < N)
        w_NK = load_masked(weight, n, K, n < N, k, k < K).to(dy_MN.dtype)
        total = tl.dot(dy_MN, w_NK, total, input_precision=PRECISION)
    return total


@kernel
def forward_kernel(
    x, weights, biases, ys, M, x_group, x_row, weight_groups, bias_groups, row_blocks,
    BIAS: tl.constexpr, NS: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ys[i] (groups, M, NS[i]) = x (groups, M, K) weights[i]^T (groups, K, NS[i]) + biases[i]."""
    wait_for_earlier()
    group, start_row, within, live = block_of_rows(M, row_blocks, ROWS)
    k = tl.arange(0, BLOCK_K)
    x += group * x_group + start_row.to(tl.int64) * x_row
    x_MK = load_masked(x, within, x_row, live, k, k < K)
    first = group * M + start_row
    for i in tl.static_range(COUNT):
        weight, bias = weights[i] + group * weight_groups[i], biases[i] + group * bias_groups[i]
        y = ys[i] + first * NS[i]
        _multiply(x_MK, weight, bias, y, within, k, live, BIAS, NS[i], BLOCKS[i], K, STAGES, PRECISION)


@kernel
def input_kernel(
    dys, weights, dx, M, weight_groups, row_blocks,
    NS: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (groups, M, K) = sum over i of dys[i] (groups, M, NS[i]) weights[i] (groups, NS[i], K)."""
    wait_for_earlier()
    group, start_row, within, live = block_of_rows(M, row_blocks, ROWS)
    k = tl.arange(0, BLOCK_K)
    first = group * M + start_row
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for i in tl.static_range(COUNT):
        weight, dy = weights[i] + group * weight_groups[i], dys[i] + first * NS[i]
        total = _add_product(total, dy, weight, within, k, live, NS[i], BLOCKS[i], K, STAGES, PRECISION)
    store_masked(dx + first * K, total, within, K, live, k, k < K)
