"""Tiles of logits: made from rows of hidden and rows of the head, used, and dropped.

The forward and both gradients walk one axis of the (M, V) logits in steps, each program a part of that axis. Of more
than BLOCK_D channels a program keeps the first BLOCK_D of its rows and loads the others at each step.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def forward_kernel(
    hidden, weight, largest, total, best, M, V, part, steps, parts, hidden_g, hidden_m, weight_g, weight_v,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a group, ROWS rows and `steps` blocks of COLUMNS tokens; results (parts, groups, M), `part` apart.

    largest: the largest logit; total: the sum of exp(logit - largest); best: the first token with the largest logit.
    EVEN: COLUMNS divides V.
    """
    blocks = tl.cdiv(M, ROWS)
    m = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    piece = tl.program_id(0) // blocks % parts
    group = tl.cast(tl.program_id(0) // (blocks * parts), tl.int64)
    d = tl.arange(0, BLOCK_D)
    hidden += group * hidden_g
    weight += group * weight_g
    b_hidden = load_rows(hidden, m.to(tl.int64), hidden_m, m < M, d, D, BLOCK_D)
    column = tl.arange(0, COLUMNS)
    b_largest = tl.full((ROWS,), float("-inf"), tl.float32)
    b_total = tl.zeros((ROWS,), tl.float32)
    b_best = tl.zeros((ROWS,), tl.int32)
    for i in range(piece * steps, tl.minimum((piece + 1) * steps, tl.cdiv(V, COLUMNS))):
        v = i * COLUMNS + column
        b_weight = load_rows(weight, v.to(tl.int64), weight_v, v < V, d, D, BLOCK_D)
        logits = tl.dot(b_hidden, tl.trans(b_weight), input_precision=PRECISION)
        logits = add_products(logits, hidden, m, hidden_m, M, weight, v, weight_v, V, D, BLOCK_D, PRECISION)
        if not EVEN:
            logits = tl.where((v < V)[None, :], logits, float("-inf"))
        highest = tl.max(logits, 1)
        token = tl.min(tl.where(logits == highest[:, None], column[None, :], COLUMNS), 1)
        b_best = tl.where(highest > b_largest, token + i * COLUMNS, b_best)
        highest = tl.maximum(highest, b_largest)
        b_total *= tl.exp2((b_largest - highest) * LOG2E)
        b_total += tl.sum(tl.exp2(logits * LOG2E - (highest * LOG2E)[:, None]), 1)
        b_largest = highest
    at = tl.cast(piece, tl.int64) * part + group * M + m
    tl.store(largest + at, b_largest, mask=m < M)
    tl.store(total + at, b_total, mask=m < M)
    tl.store(best + at, b_best, mask=m < M)


@triton.jit
def combine_kernel(
    hidden, weight, largest, total, best, answers, loss, log_sum, prediction, M, part, parts,
    hidden_g, hidden_m, weight_g, weight_v, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS of all groups' rows a program: the parts' results to loss, prediction, and log_sum in units of log2."""
    at = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    live = at < part
    answer = tl.load(answers + at, mask=live, other=-1)
    b_largest = tl.load(largest + at, mask=live, other=0.0)
    b_total = tl.load(total + at, mask=live, other=1.0)
    b_best = tl.load(best + at, mask=live, other=0)
    for i in range(1, parts):
        other = at + tl.cast(i, tl.int64) * part
        highest = tl.load(largest + other, mask=live, other=0.0)
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
    b_log_sum = b_largest * LOG2E + tl.log2(b_total)
    # In this order the large numbers cancel first.
    b_loss = tl.where(asked, (b_largest - at_answer) + tl.log2(b_total) / LOG2E, 0.0)
    tl.store(loss + at, b_loss, mask=live)
    tl.store(log_sum + at, b_log_sum, mask=live)
    tl.store(prediction + at, b_best.to(tl.int64), mask=live)


@triton.jit
def gradient(
    x, x_n, y, y_n, answers, log_sum, dloss, out, block, strip, first, last, X, Y,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    OF_HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_X rows of x, hidden (OF_HIDDEN) or the head, the part that blocks first..last of the other, y, give.

    In BLOCK_D channels, the `strip`-th such block.
    """
    n = block * BLOCK_X + tl.arange(0, BLOCK_X)
    d = tl.arange(0, BLOCK_D)
    b_x = load_rows(x, n.to(tl.int64), x_n, n < X, d, D, BLOCK_D)
    if OF_HIDDEN:
        answer = tl.load(answers + n, mask=n < X, other=-1).to(tl.int32)
        b_log_sum = tl.load(log_sum + n, mask=n < X, other=0.0)
        scale = tl.where(answer >= 0, tl.load(dloss + n, mask=n < X, other=0.0), 0.0)
    column = tl.arange(0, BLOCK_Y)
    total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    for i in range(first, last):
        k = i * BLOCK_Y + column
        b_y = load_rows(y, k.to(tl.int64), y_n, k < Y, d, D, BLOCK_D)
        logits = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
        logits = add_products(logits, x, n, x_n, X, y, k, y_n, Y, D, BLOCK_D, PRECISION)
        if D > BLOCK_D:
            b_y = load_rows(y, k.to(tl.int64), y_n, k < Y, strip * BLOCK_D + d, D, BLOCK_D)
        if OF_HIDDEN:
            # Tokens past the vocabulary have a weight of zero here.
            p = tl.exp2(logits * LOG2E - b_log_sum[:, None])
            slope = tl.where(column[None, :] == (answer - i * BLOCK_Y)[:, None], p - 1, p)
        else:
            answer = tl.load(answers + k, mask=k < Y, other=-1).to(tl.int32)
            b_log_sum = tl.load(log_sum + k, mask=k < Y, other=0.0)
            scale = tl.where(answer >= 0, tl.load(dloss + k, mask=k < Y, other=0.0), 0.0)
            p = tl.exp2(logits * LOG2E - b_log_sum[None, :])
            slope = tl.where(n[:, None] == answer[None, :], p - 1, p) * scale[None, :]
        if b_y.dtype == tl.float16:
            # Slopes can be smaller than fp16 has numbers; tf32 has its precision and the range.
            total = tl.dot(slope, b_y.to(tl.float32), total, input_precision="tf32")
        else:
            total = tl.dot(slope.to(b_y.dtype), b_y, total, input_precision=PRECISION)
    if OF_HIDDEN:
        total *= scale[:, None]
    store_rows(out, total, n.to(tl.int64), D, n < X, strip * BLOCK_D + d, D, BLOCK_D)


@triton.jit
def backward_kernel(
    hidden, weight, answers, log_sum, dloss, dhidden, dweight, M, V, groups, hidden_steps, hidden_parts, weight_steps,
    weight_parts, hidden_g, hidden_m, weight_g, weight_v, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a group and a part of the gradient of ROWS rows and BLOCK_D channels, of hidden or of the head.

    dhidden (hidden_parts, groups, M, D), dweight (weight_parts, groups, V, D): parts to be summed.
    """
    hidden_blocks = tl.cdiv(M, ROWS)
    weight_blocks = tl.cdiv(V, ROWS)
    of_hidden = hidden_blocks * hidden_parts
    programs = of_hidden + weight_blocks * weight_parts
    strips: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    strip = tl.program_id(0) % strips
    group = tl.cast(tl.program_id(0) // (strips * programs), tl.int64)
    role = tl.program_id(0) // strips % programs
    hidden += group * hidden_g
    weight += group * weight_g
    answers += group * M
    log_sum += group * M
    dloss += group * M
    if role < of_hidden:
        piece = role // hidden_blocks
        gradient(
            hidden, hidden_m, weight, weight_v, answers, log_sum, dloss, dhidden + (piece * groups + group) * M * D,
            role % hidden_blocks, strip,
            piece * hidden_steps, tl.minimum((piece + 1) * hidden_steps, tl.cdiv(V, COLUMNS)), M, V,
            D, BLOCK_D, ROWS, COLUMNS, True, PRECISION,
        )  # fmt: skip
    else:
        role -= of_hidden
        piece = role // weight_blocks
        gradient(
            weight, weight_v, hidden, hidden_m, answers, log_sum, dloss, dweight + (piece * groups + group) * V * D,
            role % weight_blocks, strip,
            piece * weight_steps, tl.minimum((piece + 1) * weight_steps, tl.cdiv(M, COLUMNS)), V, M,
            D, BLOCK_D, ROWS, COLUMNS, False, PRECISION,
        )  # fmt: skip
