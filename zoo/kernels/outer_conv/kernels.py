"""Outer products and their read-out, between the model's tensors and products that have time as their last axis.

A program has C tokens of one sequence and BLOCK heads, and takes the pairs of channels i, j one after another. q
(B, T, I, H) and v, y (B, T, J, H) have strides over sequences and tokens; k is (B, I, H, T), kv and s (B, I, J, H, T).
"""

# Tuples grow by sums, because Triton has no star, and so change their type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier

# Channels of a head whose sums a program can hold.
FEW = tl.constexpr(8)


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
def _turned(b, t, h, T, i, I: tl.constexpr, H: tl.constexpr):
    """Where channel i, of all I, stands in what has time last, (BLOCK, C)."""
    return ((b * I + i) * H + h[:, None]) * T + t[None, :]


@triton.jit
def _load_turned(x, at, inside):
    return tl.load(x + at, mask=tl.trans(inside), other=0.0).to(tl.float32)


@triton.jit
def _store_turned(x, values, at, inside):
    tl.store(x + at, values.to(x.dtype.element_ty), mask=tl.trans(inside))


@kernel
def outer_kernel(
    k, v, kv, T, v_b, v_t,
    I: tl.constexpr, J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """kv_ij = k_i v_j."""
    wait_for_earlier()
    b, t, h, inside = _place(T, H, C, BLOCK)
    for j in range(J):
        b_v = tl.trans(_load(v, b, t, h, v_b, v_t, j, inside, H))
        for i in range(I):
            product = b_v * _load_turned(k, _turned(b, t, h, T, i, I, H), inside)
            _store_turned(kv, product, _turned(b, t, h, T, i * J + j, I * J, H), inside)


@kernel
def read_kernel(
    q, s, y, T, q_b, q_t,
    I: tl.constexpr, J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y_j = sum_i q_i s_ij."""
    wait_for_earlier()
    b, t, h, inside = _place(T, H, C, BLOCK)
    for j in range(J):
        total = tl.zeros((C, BLOCK), tl.float32)
        for i in range(I):
            b_s = tl.trans(_load_turned(s, _turned(b, t, h, T, i * J + j, I * J, H), inside))
            total += b_s * _load(q, b, t, h, q_b, q_t, i, inside, H)
        _store(y, total, b, t, h, T, j, inside, J, H)


@kernel
def read_backward_kernel(
    dy, q, s, dq, ds, T, dy_b, dy_t, q_b, q_t,
    I: tl.constexpr, J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq_i = sum_j s_ij dy_j and ds_ij = q_i dy_j."""
    wait_for_earlier()
    b, t, h, inside = _place(T, H, C, BLOCK)
    for i in range(I):
        b_q = _load(q, b, t, h, q_b, q_t, i, inside, H)
        total = tl.zeros((C, BLOCK), tl.float32)
        for j in range(J):
            b_dy = _load(dy, b, t, h, dy_b, dy_t, j, inside, H)
            at = _turned(b, t, h, T, i * J + j, I * J, H)
            total += tl.trans(_load_turned(s, at, inside)) * b_dy
            _store_turned(ds, tl.trans(b_q * b_dy), at, inside)
        _store(dq, total, b, t, h, T, i, inside, I, H)


@kernel
def outer_backward_kernel(
    dkv, k, v, dk, dv, T, v_b, v_t,
    I: tl.constexpr, J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk_i = sum_j dkv_ij v_j and dv_j = sum_i dkv_ij k_i."""
    wait_for_earlier()
    b, t, h, inside = _place(T, H, C, BLOCK)
    if J <= FEW:
        # All sums over i at once, so that dkv is read once.
        given, dvs = (), ()
        for j in tl.static_range(J):
            given = given + (_load(v, b, t, h, v_b, v_t, j, inside, H).to(v.dtype.element_ty),)
            dvs = dvs + (tl.zeros((BLOCK, C), tl.float32),)
        for i in range(I):
            b_k = _load_turned(k, _turned(b, t, h, T, i, I, H), inside)
            total = tl.zeros((BLOCK, C), tl.float32)
            sums = ()
            for j in tl.static_range(J):
                b_dkv = _load_turned(dkv, _turned(b, t, h, T, i * J + j, I * J, H), inside)
                total += b_dkv * tl.trans(given[j]).to(tl.float32)
                sums = sums + (dvs[j] + b_dkv * b_k,)
            dvs = sums
            _store_turned(dk, total, _turned(b, t, h, T, i, I, H), inside)
        for j in tl.static_range(J):
            _store(dv, tl.trans(dvs[j]), b, t, h, T, j, inside, J, H)
    else:
        for i in range(I):
            total = tl.zeros((BLOCK, C), tl.float32)
            for j in range(J):
                b_dkv = _load_turned(dkv, _turned(b, t, h, T, i * J + j, I * J, H), inside)
                total += b_dkv * tl.trans(_load(v, b, t, h, v_b, v_t, j, inside, H))
            _store_turned(dk, total, _turned(b, t, h, T, i, I, H), inside)
        for j in range(J):
            total = tl.zeros((BLOCK, C), tl.float32)
            for i in range(I):
                b_dkv = _load_turned(dkv, _turned(b, t, h, T, i * J + j, I * J, H), inside)
                total += b_dkv * _load_turned(k, _turned(b, t, h, T, i, I, H), inside)
            _store(dv, tl.trans(total), b, t, h, T, j, inside, J, H)
