"""Tiles of logits: made from rows of hidden and rows of the head, used, and dropped.

All kernels walk one axis of the (M, V) logits in steps, each program a part of the other axis. Of more than BLOCK_D
channels a program keeps the first BLOCK_D of its rows and loads the others at each step; products of that width come in
strips of BLOCK_D, each a program's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.tiles import LOG2E, load_rows, store_rows


@triton.jit
def add_products(total, x, n, x_n, X, y, k, y_n, Y, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """total + x_n . y_k over the channels from BLOCK_D on."""
    for first in range(BLOCK_D, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        b_x = load_rows(x, n.to(tl.int64), x_n, n < X, d, D, BLOCK_D)
        b_y = load_rows(y, k.to(tl.int64), y_n, k < Y, d, D, BLOCK_D)
        total = tl.dot(b_x, tl.trans(b_y), total, input_precision=PRECISION)
    return total


@triton.jit
def add_slopes(total, slope, b_y, PRECISION: tl.constexpr):
    """total + slope b_y."""
    if b_y.dtype == tl.float16:
        # Slopes can be smaller than fp16 has numbers; tf32 has its precision and the range.
        return tl.dot(slope, b_y.to(tl.float32), total, input_precision="tf32")
    return tl.dot(slope.to(b_y.dtype), b_y, total, input_precision=PRECISION)


@kernel
def forward_kernel(
    hidden, weight, answers, largest, total, best, pull, M, V, part, steps, parts,
    hidden_g, hidden_m, weight_g, weight_v,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    GRADIENT: tl.constexpr, PREDICT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a group, ROWS rows and `steps` blocks of COLUMNS tokens; results (parts, groups, M), `part` apart.

    largest: the largest logit; total: the sum of exp(logit - largest); best: the first token with the largest logit.
    GRADIENT: pull (parts, groups, M, D) is the sum of exp(logit - largest) weight over all tokens but the answer.
    EVEN: COLUMNS divides V.
    """
    wait_for_earlier()
    blocks = tl.cdiv(M, ROWS)
    strips: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D if GRADIENT else 1
    strip = tl.program_id(0) % strips
    program = tl.program_id(0) // strips
    m = program % blocks * ROWS + tl.arange(0, ROWS)
    piece = program // blocks % parts
    group = tl.cast(program // (blocks * parts), tl.int64)
    d = tl.arange(0, BLOCK_D)
    hidden += group * hidden_g
    weight += group * weight_g
    b_hidden = load_rows(hidden, m.to(tl.int64), hidden_m, m < M, d, D, BLOCK_D)
    column = tl.arange(0, COLUMNS)
    # A number, for blocks without any token to count.
    b_largest = tl.full((ROWS,), -1e30, tl.float32)
    b_total = tl.zeros((ROWS,), tl.float32)
    b_best = tl.zeros((ROWS,), tl.int32)
    if GRADIENT:
        answer = tl.load(answers + group * M + m, mask=m < M, other=-1).to(tl.int32)
        b_pull = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(piece * steps, tl.minimum((piece + 1) * steps, tl.cdiv(V, COLUMNS))):
        v = i * COLUMNS + column
        live = EVEN | (v < V)
        b_weight = load_rows(weight, v.to(tl.int64), weight_v, live, d, D, BLOCK_D)
        logits = tl.dot(b_hidden, tl.trans(b_weight), input_precision=PRECISION)
        logits = add_products(logits, hidden, m, hidden_m, M, weight, v, weight_v, V, D, BLOCK_D, PRECISION)
        logits = tl.where(live[None, :], logits, float("-inf"))
        if GRADIENT:
            logits = tl.where(column[None, :] == (answer - i * COLUMNS)[:, None], float("-inf"), logits)
        highest = tl.max(logits, 1)
        if PREDICT:
            token = tl.min(tl.where(logits == highest[:, None], column[None, :], COLUMNS), 1)
            b_best = tl.where(highest > b_largest, token + i * COLUMNS, b_best)
        highest = tl.maximum(highest, b_largest)
        shrink = tl.exp2((b_largest - highest) * LOG2E)
        p = tl.exp2(logits * LOG2E - (highest * LOG2E)[:, None])
        b_total = b_total * shrink + tl.sum(p, 1)
        b_largest = highest
        if GRADIENT:
            if D > BLOCK_D:
                b_weight = load_rows(weight, v.to(tl.int64), weight_v, live, strip * BLOCK_D + d, D, BLOCK_D)
            b_pull = add_slopes(b_pull * shrink[:, None], p, b_weight, PRECISION)
    at = tl.cast(piece, tl.int64) * part + group * M + m
    if strip == 0:
        tl.store(largest + at, b_largest, mask=m < M)
        tl.store(total + at, b_total, mask=m < M)
        if PREDICT:
            tl.store(best + at, b_best, mask=m < M)
    if GRADIENT:
        store_rows(pull, b_pull, at, D, m < M, strip * BLOCK_D + d, D, BLOCK_D)


@kernel
def combine_kernel(
    hidden, weight, largest, total, best, pull, answers, loss, log_sum, prediction, slope, M, part, parts,
    hidden_g, hidden_m, weight_g, weight_v,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, GRADIENT: tl.constexpr,
    PREDICT: tl.constexpr,
):  # fmt: skip
    """ROWS of all groups' rows a program: the parts' results to loss, prediction, and log_sum in units of log2.

    GRADIENT: slope (groups, M, D) is the gradient of the loss with respect to hidden.
    """
    wait_for_earlier()
    at = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    live = at < part
    answer = tl.load(answers + at, mask=live, other=-1)
    b_largest = tl.load(largest + at, mask=live, other=0.0)
    b_total = tl.load(total + at, mask=live, other=1.0)
    if PREDICT:
        b_best = tl.load(best + at, mask=live, other=0)
    for i in range(1, parts):
        other = at + tl.cast(i, tl.int64) * part
        highest = tl.load(largest + other, mask=live, other=0.0)
        if PREDICT:
            b_best = tl.where(highest > b_largest, tl.load(best + other, mask=live, other=0), b_best)
        shared = tl.maximum(highest, b_largest)
        b_total *= tl.exp2((b_largest - shared) * LOG2E)
        b_total += tl.load(total + other, mask=live, other=1.0) * tl.exp2((highest - shared) * LOG2E)
        b_largest = shared
    hidden += (at // M * hidden_g)[:, None]
    weight += (at // M * weight_g)[:, None]
    asked = live & (answer >= 0)
    at_answer = tl.zeros((ROWS,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        b_hidden = load_rows(hidden, at % M, hidden_m, asked, d, D, BLOCK_D)
        b_weight = load_rows(weight, answer, weight_v, asked, d, D, BLOCK_D)
        at_answer += tl.sum(b_hidden.to(tl.float32) * b_weight.to(tl.float32), 1)
    if GRADIENT:
        # The forward kernel has left out the answer.
        if PREDICT:
            b_best = tl.where(asked & (at_answer > b_largest), answer.to(tl.int32), b_best)
        shared = tl.where(asked, tl.maximum(b_largest, at_answer), b_largest)
        others = b_total * tl.exp2((b_largest - shared) * LOG2E)
        b_total = others + tl.where(asked, tl.exp2((at_answer - shared) * LOG2E), 0.0)
        b_largest = shared
    b_log_sum = b_largest * LOG2E + tl.log2(b_total)
    # In this order the large numbers cancel first.
    b_loss = tl.where(asked, (b_largest - at_answer) + tl.log2(b_total) / LOG2E, 0.0)
    tl.store(loss + at, b_loss, mask=live)
    # No token of a row that is ignored has a slope.
    tl.store(log_sum + at, tl.where(asked, b_log_sum, float("inf")), mask=live)
    if PREDICT:
        tl.store(prediction + at, b_best.to(tl.int64), mask=live)
    if GRADIENT:
        others = -others / b_total
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            b_slope = load_rows(weight, answer, weight_v, asked, d, D, BLOCK_D).to(tl.float32) * others[:, None]
            for i in range(parts):
                other = at + tl.cast(i, tl.int64) * part
                share = tl.exp2(tl.load(largest + other, mask=live, other=0.0) * LOG2E - b_log_sum)
                b_slope += load_rows(pull, other, D, asked, d, D, BLOCK_D) * share[:, None]
            store_rows(slope, b_slope, at, D, live, d, D, BLOCK_D)


@kernel
def backward_kernel(
    hidden, weight, answers, log_sum, dloss, dweight, M, V, groups, steps, parts,
    hidden_g, hidden_m, weight_g, weight_v, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a group, ROWS tokens of the head, BLOCK_D channels and `steps` blocks of COLUMNS rows of hidden.

    dweight (parts, groups, V, D), parts to be summed. EVEN: COLUMNS divides M.
    """
    wait_for_earlier()
    strips: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    strip = tl.program_id(0) % strips
    program = tl.program_id(0) // strips
    blocks = tl.cdiv(V, ROWS)
    block = program % blocks
    piece = program // blocks % parts
    group = tl.cast(program // (blocks * parts), tl.int64)
    hidden += group * hidden_g
    weight += group * weight_g
    answers += group * M
    log_sum += group * M
    dloss += group * M
    v = block * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    b_weight = load_rows(weight, v.to(tl.int64), weight_v, v < V, d, D, BLOCK_D)
    row = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(piece * steps, tl.minimum((piece + 1) * steps, tl.cdiv(M, COLUMNS))):
        m = i * COLUMNS + row
        live = EVEN | (m < M)
        b_hidden = load_rows(hidden, m.to(tl.int64), hidden_m, live, d, D, BLOCK_D)
        logits = tl.dot(b_weight, tl.trans(b_hidden), input_precision=PRECISION)
        logits = add_products(logits, weight, v, weight_v, V, hidden, m, hidden_m, M, D, BLOCK_D, PRECISION)
        if D > BLOCK_D:
            b_hidden = load_rows(hidden, m.to(tl.int64), hidden_m, live, strip * BLOCK_D + d, D, BLOCK_D)
        answer = tl.load(answers + m, mask=live, other=-1).to(tl.int32)
        b_log_sum = tl.load(log_sum + m, mask=live, other=float("inf"))
        scale = tl.load(dloss + m, mask=live, other=0.0)
        p = tl.exp2(logits * LOG2E - b_log_sum[None, :])
        p = p * scale[None, :] - tl.where(v[:, None] == answer[None, :], scale[None, :], 0.0)
        total = add_slopes(total, p, b_hidden, PRECISION)
    at = (piece * groups + group) * V + v
    store_rows(dweight, total, at.to(tl.int64), D, v < V, strip * BLOCK_D + d, D, BLOCK_D)


@kernel
def scale_kernel(slope, dloss, out, M, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """out (M, D) = dloss (M) slope (M, D)."""
    wait_for_earlier()
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (row < M)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    scaled = tl.load(slope + at, mask=mask).to(tl.float32) * tl.load(dloss + row, mask=row < M)[:, None]
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=mask)
