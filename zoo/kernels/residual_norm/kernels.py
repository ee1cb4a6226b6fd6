"""A program takes blocks of rows, one after another; a row is in registers from its first load to its last store."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.gather_rows.kernels import scattered


@triton.jit
def standardised(stream, column, eps, RMS: tl.constexpr, D: tl.constexpr):
    """Rows of mean 0 (unless RMS) and mean square 1, and what they were divided by, inverted."""
    if not RMS:
        stream = tl.where((column < D)[None, :], stream - (tl.sum(stream, 1) / D)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(stream * stream, 1) / D + eps)
    return stream * scale[:, None], scale


@triton.jit
def load_stream(x, tokens, group, row, column, mask, M, V, LOOKUP: tl.constexpr, D: tl.constexpr):
    """Rows of x (groups, M, D) in fp32; with LOOKUP those of a table (groups, V, D) that tokens (groups, M) name."""
    if LOOKUP:
        token = tl.load(tokens + group * M + row, mask=row < M, other=0)
        at = (group * V + token)[:, None] * D + column[None, :]
    else:
        at = (group * M + row)[:, None] * D + column[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@kernel
def forward_kernel(
    x, tokens, branch, weight, bias, stream, normed, M, V, steps, parts, eps,
    LOOKUP: tl.constexpr, BRANCH: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    column = tl.arange(0, BLOCK_D)
    scale = tl.load(weight + group * D + column, mask=column < D, other=0.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    if BIAS:
        shift = tl.load(bias + group * D + column, mask=column < D, other=0.0).to(tl.float32)
    for step in range(steps):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        at = (group.to(tl.int64) * M + row)[:, None] * D + column[None, :]
        mask = (row < M)[:, None] & (column < D)[None, :]
        total = load_stream(x, tokens, group.to(tl.int64), row, column, mask, M, V, LOOKUP, D)
        if BRANCH:
            total += tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(stream + at, total.to(stream.dtype.element_ty), mask=mask)
        # What the backward pass will read.
        total = total.to(stream.dtype.element_ty).to(tl.float32)
        unit, _ = standardised(total, column, eps, RMS, D)
        tl.store(normed + at, (unit * scale[None, :] + shift[None, :]).to(normed.dtype.element_ty), mask=mask)


@kernel
def backward_kernel(
    stream, tokens, weight, dstream, dnormed, positions, dx, dbranch, dweight, dbias, M, V, T, Q, steps, parts, eps,
    LOOKUP: tl.constexpr, STREAM: tl.constexpr, ASKED: tl.constexpr, BRANCH: tl.constexpr, BIAS: tl.constexpr,
    RMS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dstream (groups, M, D), or, if ASKED, at positions (groups, M / T, Q) of sequences of T, a multiple of ROWS.

    dweight and dbias (groups, parts, D) are sums over the rows of a program."""
    wait_for_earlier()
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    column = tl.arange(0, BLOCK_D)
    scale = tl.load(weight + group * D + column, mask=column < D, other=0.0).to(tl.float32)
    sum_scale, sum_shift = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for step in range(steps):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        at = (group.to(tl.int64) * M + row)[:, None] * D + column[None, :]
        mask = (row < M)[:, None] & (column < D)[None, :]
        # All loads before the first sum, which would hold them up.
        total = load_stream(stream, tokens, group.to(tl.int64), row, column, mask, M, V, LOOKUP, D)
        slope = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32)
        if STREAM:
            if ASKED:
                first = tl.minimum((part * steps + step) * ROWS, M - ROWS)
                sequence = ((group * M + first) // T).to(tl.int64)
                passed = scattered(
                    dstream + sequence * Q * D, positions + sequence * Q, first % T + tl.arange(0, ROWS), Q,
                    column, D, ROWS, BLOCK_Q,
                )  # fmt: skip
            else:
                passed = tl.load(dstream + at, mask=mask, other=0.0).to(tl.float32)
        unit, inverse = standardised(total, column, eps, RMS, D)
        sum_scale += tl.sum(slope * unit, 0)
        sum_shift += tl.sum(slope, 0)
        slope *= scale[None, :]
        change = slope - unit * (tl.sum(slope * unit, 1) / D)[:, None]
        if not RMS:
            change -= (tl.sum(slope, 1) / D)[:, None]
        change *= inverse[:, None]
        if STREAM:
            change += passed
        tl.store(dx + at, change.to(dx.dtype.element_ty), mask=mask)
        if BRANCH:
            tl.store(dbranch + at, change.to(dbranch.dtype.element_ty), mask=mask)
    at = tl.program_id(0) * D + column
    tl.store(dweight + at, sum_scale, mask=column < D)
    if BIAS:
        tl.store(dbias + at, sum_shift, mask=column < D)
