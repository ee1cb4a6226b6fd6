"""Triangular matrices over the steps of a chunk, row t by column s: what the write of step s means to step t > s."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import LOG2E


@triton.jit
def load_steps(x, at, row, stride, T):
    """One number a step, in fp32; 0 past the end."""
    return tl.load(x + (at + row) * stride, mask=at + row < T, other=0.0).to(tl.float32)


@triton.jit
def load_decay(g, at, row, stride, T):
    """Log2 decays of the steps at + row, 0 past the end. Below -200 nothing is left in fp32 anyway."""
    return tl.maximum(load_steps(g, at, row, stride, T) * LOG2E, -200.0)


@triton.jit
def load_square(x, C: tl.constexpr):
    """A C x C matrix stored by rows."""
    i = tl.arange(0, C)
    return tl.load(x + i[:, None] * C + i[None, :])


@triton.jit
def store_square(x, values, C: tl.constexpr):
    i = tl.arange(0, C)
    tl.store(x + i[:, None] * C + i[None, :], values.to(x.dtype.element_ty))


@triton.jit
def decay_until(g, since, total, at, row, stride, T, C: tl.constexpr, dtype: tl.constexpr):
    """Log2 of what the decays behind each step leave, where `since` is from the start of the chunk to the step. In fp32
    it is a sum, not a difference of longer ones."""
    if dtype == tl.float32:
        return tl.cumsum(load_decay(g, at, row + 1, stride, tl.minimum(T, at + C)), 0, reverse=True)
    else:
        return total - since


@triton.jit
def decay_between(g, since, C: tl.constexpr, dtype: tl.constexpr):
    """2^(g_{s+1} + ... + g_t) at (t, s) for s <= t, else 0; as `decay_until`."""
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    if dtype == tl.float32:
        between = tl.dot((s <= t).to(tl.float32), tl.where(t > s, g[:, None], 0.0), input_precision="tf32x3")
    else:
        between = since[:, None] - since[None, :]
    return tl.exp2(tl.where(s <= t, between, float("-inf")))


@triton.jit
def pairs_of_halves(x, h, C: tl.constexpr):
    """x (C, C) where row and column are in the last and in the first half of one aligned block of 2h, else 0."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return tl.where(((i & h) != 0) & (((i ^ j) & (C - h)) == h), x, tl.zeros_like(x))


@triton.jit
def inverse(x, C: tl.constexpr, HALVINGS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + x)^-1 for x zero on and above the diagonal, block by block: stable, as powers of x would not be."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    found = tl.where(i == j, 1.0, 0.0) - pairs_of_halves(x, 1, C)
    for doubling in tl.static_range(1, HALVINGS):
        across = tl.dot(pairs_of_halves(x, 1 << doubling, C), found, input_precision=PRECISION)
        found -= tl.dot(found, across, input_precision=PRECISION)
    return found
