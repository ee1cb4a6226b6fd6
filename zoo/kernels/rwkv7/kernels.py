"""A program has one head, and takes blocks of its rows, one token each."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier


@triton.jit
def _place(M, parts, H: tl.constexpr, BLOCK: tl.constexpr):
    """A program's group, head and part; and channels."""
    at, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    return (at // H).to(tl.int64) * M, at % H, part, tl.arange(0, BLOCK)


@triton.jit
def _load(x, row, head, column, mask, H: tl.constexpr, K: tl.constexpr):
    return tl.load(x + ((row * H + head) * K)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, values, row, head, column, mask, H: tl.constexpr, K: tl.constexpr):
    to = x + ((row * H + head) * K)[:, None] + column[None, :]
    tl.store(to, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_weight(weight, parts, column, K: tl.constexpr):
    """Weights (groups, H, K) of a program's head."""
    row = tl.program_id(0) // parts
    return tl.load(weight + row * K + column, mask=column < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_sum(sums, values, column, K: tl.constexpr):
    tl.store(sums + tl.program_id(0) * K + column, tl.sum(values, 0), mask=column < K)


@triton.jit
def _standardised(u, inside, eps, K: tl.constexpr):
    """Rows of mean 0 and mean square 1, and what they were divided by, inverted."""
    u = tl.where(inside[None, :], u - (tl.sum(u, 1) / K)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(u * u, 1) / K + eps)[:, None]
    return u * inverse, inverse


@kernel
def keys_forward_kernel(
    k, rate, rate_bias, removal, replacement, written, a, b, M, steps, parts, eps,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    first, head, part, column = _place(M, parts, H, BLOCK)
    b_bias, b_removal = _load_weight(rate_bias, parts, column, K), _load_weight(removal, parts, column, K)
    b_replacement = _load_weight(replacement, parts, column, K)
    for step in range(steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        row, mask = first + token, (token < M)[:, None] & (column < K)[None, :]
        b_k = _load(k, row, head, column, mask, H, K)
        eta = tl.sigmoid(_load(rate, row, head, column, mask, H, K) + b_bias)
        kappa = b_k * b_removal
        kappa = kappa / tl.maximum(tl.sqrt(tl.sum(kappa * kappa, 1)), eps)[:, None]
        _store(written, b_k * (1 + (eta - 1) * b_replacement), row, head, column, mask, H, K)
        _store(a, -kappa, row, head, column, mask, H, K)
        _store(b, kappa * eta, row, head, column, mask, H, K)


@kernel
def keys_backward_kernel(
    k, rate, rate_bias, removal, replacement, dwritten, da, db, dk, drate, sums, M, steps, parts, eps,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Three sums (groups * H, parts, K): of a program's rows, the gradients of rate_bias, removal and replacement."""
    wait_for_earlier()
    first, head, part, column = _place(M, parts, H, BLOCK)
    b_bias, b_removal = _load_weight(rate_bias, parts, column, K), _load_weight(removal, parts, column, K)
    b_replacement = _load_weight(replacement, parts, column, K)
    zeros = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias, dremoval, dreplacement = zeros, zeros, zeros
    for step in range(steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        row, mask = first + token, (token < M)[:, None] & (column < K)[None, :]
        b_k = _load(k, row, head, column, mask, H, K)
        eta = tl.sigmoid(_load(rate, row, head, column, mask, H, K) + b_bias)
        kappa = b_k * b_removal
        inverse = 1 / tl.maximum(tl.sqrt(tl.sum(kappa * kappa, 1)), eps)[:, None]
        kappa *= inverse
        b_dwritten = _load(dwritten, row, head, column, mask, H, K)
        b_db = _load(db, row, head, column, mask, H, K)
        deta = b_db * kappa + b_dwritten * b_k * b_replacement
        dkappa = b_db * eta - _load(da, row, head, column, mask, H, K)
        dlong = inverse * (dkappa - kappa * tl.sum(kappa * dkappa, 1)[:, None])
        b_dk = b_dwritten * (1 + (eta - 1) * b_replacement) + dlong * b_removal
        b_drate = deta * eta * (1 - eta)
        _store(dk, b_dk, row, head, column, mask, H, K)
        _store(drate, b_drate, row, head, column, mask, H, K)
        dbias += b_drate
        dremoval += dlong * b_k
        dreplacement += b_dwritten * b_k * (eta - 1)
    _store_sum(sums[0], dbias, column, K)
    _store_sum(sums[1], dremoval, column, K)
    _store_sum(sums[2], dreplacement, column, K)


@kernel
def readout_forward_kernel(
    o, q, k, v, gate, weight, bias, bonus, y, M, steps, parts, eps,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    first, head, part, column = _place(M, parts, H, BLOCK)
    b_weight, b_bias = _load_weight(weight, parts, column, K), _load_weight(bias, parts, column, K)
    b_bonus = _load_weight(bonus, parts, column, K)
    for step in range(steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        row, mask = first + token, (token < M)[:, None] & (column < K)[None, :]
        unit = _standardised(_load(o, row, head, column, mask, H, K), column < K, eps, K)[0]
        b_q, b_k = _load(q, row, head, column, mask, H, K), _load(k, row, head, column, mask, H, K)
        score = tl.sum(b_q * b_k * b_bonus, 1)[:, None]
        total = unit * b_weight + b_bias + score * _load(v, row, head, column, mask, H, K)
        _store(y, total * _load(gate, row, head, column, mask, H, K), row, head, column, mask, H, K)


@kernel
def readout_backward_kernel(
    o, q, k, v, gate, weight, bias, bonus, dy, do, dq, dk, dv, dgate, sums, M, steps, parts, eps,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Three sums (groups * H, parts, K): of a program's rows, the gradients of weight, bias and bonus."""
    wait_for_earlier()
    first, head, part, column = _place(M, parts, H, BLOCK)
    b_weight, b_bias = _load_weight(weight, parts, column, K), _load_weight(bias, parts, column, K)
    b_bonus = _load_weight(bonus, parts, column, K)
    zeros = tl.zeros([ROWS, BLOCK], tl.float32)
    dweight, dbias, dbonus = zeros, zeros, zeros
    for step in range(steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        row, mask = first + token, (token < M)[:, None] & (column < K)[None, :]
        unit, inverse = _standardised(_load(o, row, head, column, mask, H, K), column < K, eps, K)
        b_q, b_k = _load(q, row, head, column, mask, H, K), _load(k, row, head, column, mask, H, K)
        b_v = _load(v, row, head, column, mask, H, K)
        score = tl.sum(b_q * b_k * b_bonus, 1)[:, None]
        slope = _load(dy, row, head, column, mask, H, K)
        _store(dgate, slope * (unit * b_weight + b_bias + score * b_v), row, head, column, mask, H, K)
        slope *= _load(gate, row, head, column, mask, H, K)
        _store(dv, slope * score, row, head, column, mask, H, K)
        dscore = tl.sum(slope * b_v, 1)[:, None]
        _store(dq, dscore * b_k * b_bonus, row, head, column, mask, H, K)
        _store(dk, dscore * b_q * b_bonus, row, head, column, mask, H, K)
        dbonus += dscore * b_q * b_k
        dweight += slope * unit
        dbias += slope
        slope *= b_weight
        change = slope - unit * (tl.sum(slope * unit, 1) / K)[:, None] - (tl.sum(slope, 1) / K)[:, None]
        _store(do, change * inverse, row, head, column, mask, H, K)
    _store_sum(sums[0], dweight, column, K)
    _store_sum(sums[1], dbias, column, K)
    _store_sum(sums[2], dbonus, column, K)
