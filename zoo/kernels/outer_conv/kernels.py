"""Outer products and their read-out, between the model's tensors and products that have time as their last axis.

A program has C tokens of one sequence and BLOCK heads, and takes the pairs of channels i, j one after another. q, k
(B, T, I, H) and v, y (B, T, J, H) have strides over sequences and tokens; kv and s are (B, I, J, H, T).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(T, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: sequence, tokens, heads; and which of its elements there are."""
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    h = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    chunks = tl.cdiv(T, C)
    t = tl.program_id(0) // blocks % chunks * C + tl.cast(tl.arange(0, C), tl.int64)
    b = tl.cast(tl.program_id(0) // (blocks * chunks), tl.int64)
    return b, t, h, (t < T)[:, None] & (h < H)[None, :]


@triton.jit
def _load(x, b, t, h, x_b, x_t, i, inside, H: tl.constexpr):
    """Channel i of x (C, BLOCK)."""
    return tl.load(x + b * x_b + t[:, None] * x_t + (i * H + h)[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(y, values, b, t, h, T, j, inside, J: tl.constexpr, H: tl.constexpr):
    at = (b * T + t[:, None]) * (J * H) + (j * H + h)[None, :]
    tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _turned(b, t, h, T, pair, PAIRS: tl.constexpr, H: tl.constexpr):
    """Where a pair's products stand, (BLOCK, C)."""
    return ((b * PAIRS + pair) * H + h[:, None]) * T + t[None, :]


@triton.jit
def outer_kernel(
    k, v, kv, T, k_b, k_t, v_b, v_t,
    I: tl.constexpr, J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """kv_ij = k_i v_j."""
    b, t, h, inside = _place(T, H, C, BLOCK)
    for i in range(I):
        b_k = _load(k, b, t, h, k_b, k_t, i, inside, H)
        for j in range(J):
            product = b_k * _load(v, b, t, h, v_b, v_t, j, inside, H)
            to = kv + _turned(b, t, h, T, i * J + j, I * J, H)
            tl.store(to, tl.trans(product.to(kv.dtype.element_ty)), mask=tl.trans(inside))


@triton.jit
def read_kernel(
    q, s, y, T, q_b, q_t,
    I: tl.constexpr, J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y_j = sum_i q_i s_ij."""
    b, t, h, inside = _place(T, H, C, BLOCK)
    for j in range(J):
        total = tl.zeros((C, BLOCK), tl.float32)
        for i in range(I):
            b_s = tl.load(s + _turned(b, t, h, T, i * J + j, I * J, H), mask=tl.trans(inside), other=0.0)
            total += _load(q, b, t, h, q_b, q_t, i, inside, H) * tl.trans(b_s).to(tl.float32)
        _store(y, total, b, t, h, T, j, inside, J, H)


@triton.jit
def read_backward_kernel(
    dy, q, s, dq, ds, T, dy_b, dy_t, q_b, q_t,
    I: tl.constexpr, J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq_i = sum_j s_ij dy_j and ds_ij = q_i dy_j."""
    b, t, h, inside = _place(T, H, C, BLOCK)
    for i in range(I):
        b_q = _load(q, b, t, h, q_b, q_t, i, inside, H)
        total = tl.zeros((C, BLOCK), tl.float32)
        for j in range(J):
            b_dy = _load(dy, b, t, h, dy_b, dy_t, j, inside, H)
            at = _turned(b, t, h, T, i * J + j, I * J, H)
            total += tl.trans(tl.load(s + at, mask=tl.trans(inside), other=0.0)).to(tl.float32) * b_dy
            tl.store(ds + at, tl.trans((b_q * b_dy).to(ds.dtype.element_ty)), mask=tl.trans(inside))
        _store(dq, total, b, t, h, T, i, inside, I, H)


@triton.jit
def _contract(a, dkv, y, b, t, h, T, a_b, a_t, inside, given, wanted,
    GIVEN: tl.constexpr, WANTED: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y_w = sum_g dkv_gw a_g, whose pairs are `given` and `wanted` apart over g and w."""
    for w in range(WANTED):
        total = tl.zeros((C, BLOCK), tl.float32)
        for g in range(GIVEN):
            at = _turned(b, t, h, T, g * given + w * wanted, GIVEN * WANTED, H)
            b_dkv = tl.trans(tl.load(dkv + at, mask=tl.trans(inside), other=0.0))
            total += b_dkv.to(tl.float32) * _load(a, b, t, h, a_b, a_t, g, inside, H)
        _store(y, total, b, t, h, T, w, inside, WANTED, H)


@triton.jit
def outer_backward_kernel(
    dkv, k, v, dk, dv, T, k_b, k_t, v_b, v_t,
    I: tl.constexpr, J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk_i = sum_j dkv_ij v_j and dv_j = sum_i dkv_ij k_i."""
    b, t, h, inside = _place(T, H, C, BLOCK)
    _contract(v, dkv, dk, b, t, h, T, v_b, v_t, inside, 1, J, J, I, H, C, BLOCK)
    _contract(k, dkv, dv, b, t, h, T, k_b, k_t, inside, J, 1, I, J, H, C, BLOCK)
