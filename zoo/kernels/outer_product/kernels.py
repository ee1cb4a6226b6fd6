"""A program has a block of tokens, and takes their pairs of channels one after another."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(x, token, stride, at, column, mask):
    return tl.load(x + (token * stride + at)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _block(tokens, H: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_H)
    return token, column, (token < tokens)[:, None] & (column < H)[None, :]


@triton.jit
def outer_kernel(
    a, b, s, tokens, a_token, b_token,
    I: tl.constexpr, J: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """s_ij = a_i b_j."""
    token, column, mask = _block(tokens, H, BLOCK_H, ROWS)
    for i in range(I):
        a_i = _load(a, token, a_token, i * H, column, mask)
        for j in range(J):
            product = a_i * _load(b, token, b_token, j * H, column, mask)
            to = s + (token * (I * J * H) + (i * J + j) * H)[:, None] + column[None, :]
            tl.store(to, product.to(s.dtype.element_ty), mask=mask)


@triton.jit
def contract_kernel(
    a, s, y, tokens, a_token, given, wanted,
    GIVEN: tl.constexpr, WANTED: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y_w = sum_g a_g s_gw, where s has strides `given` and `wanted` over g and w."""
    token, column, mask = _block(tokens, H, BLOCK_H, ROWS)
    for w in range(WANTED):
        total = tl.zeros([ROWS, BLOCK_H], tl.float32)
        for g in range(GIVEN):
            s_gw = _load(s, token, GIVEN * WANTED * H, g * given + w * wanted, column, mask)
            total += _load(a, token, a_token, g * H, column, mask) * s_gw
        to = y + (token * (WANTED * H) + w * H)[:, None] + column[None, :]
        tl.store(to, total.to(y.dtype.element_ty), mask=mask)
