"""A program has a block of taps and, one after another, all layers; backward it goes there and back again."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier


@triton.jit
def _load(x, row, column, rows, columns: tl.constexpr):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + row[:, None] * columns + column[None, :], mask=mask, other=0.0)


@triton.jit
def _sine(s, weight, bias, frequency, n, k, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """The layer's sums W s + b and the sines of their multiples."""
    z = tl.dot(s, tl.trans(_load(weight, n, k, N, K)), input_precision=PRECISION)
    z += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    return z, tl.sin(frequency[None, :] * z)


@kernel
def forward_kernel(
    positions, window, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, frequency, out_weight, h,
    L, length, blocks,
    F: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a group, all of whose tensors are its own, and BLOCK taps."""
    wait_for_earlier()
    group = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    f, n = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_N)
    b_frequency = tl.load(frequency + group * N + n, mask=n < N, other=0.0)
    s = _load(positions + group * L * F, t, f, length, F)
    _, s = _sine(s, weight_1 + group * N * F, bias_1 + group * N, b_frequency, n, f, N, F, PRECISION)
    _, s = _sine(s, weight_2 + group * N * N, bias_2 + group * N, b_frequency, n, n, N, N, PRECISION)
    _, s = _sine(s, weight_3 + group * N * N, bias_3 + group * N, b_frequency, n, n, N, N, PRECISION)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        out = tl.dot(s, tl.trans(_load(out_weight + group * D * N, d, n, D, N)), input_precision=PRECISION)
        out *= _load(window + group * L * D, t, d, length, D)
        mask = (t < length)[:, None] & (d < D)[None, :]
        tl.store(h + group * D * length + d[None, :] * length + t[:, None], out, mask=mask)


@triton.jit
def _back(
    ds, z, before, weight, dweight, dbias, frequency, n, k,
    N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of a layer's sines to that of what it was given; and the frequencies' gradient."""
    ds *= tl.cos(frequency[None, :] * z)
    dz = ds * frequency[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(dweight + n[:, None] * K + k[None, :], tl.dot(tl.trans(dz), before, input_precision=PRECISION), mask=mask)
    tl.store(dbias + n, tl.sum(dz, 0), mask=n < N)
    return tl.dot(dz, _load(weight, n, k, N, K), input_precision=PRECISION), tl.sum(ds * z, 0)


@kernel
def backward_kernel(
    positions, window, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, frequency, out_weight, dh,
    dweight_1, dbias_1, dweight_2, dbias_2, dweight_3, dbias_3, dfrequency, dout_weight, L, length, blocks,
    F: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As the forward. Each gradient (groups, blocks, ...): a program's part."""
    wait_for_earlier()
    part = tl.program_id(0).to(tl.int64)
    group = part // blocks
    t = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = (t < length)[:, None]
    f, n = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_N)
    b_frequency = tl.load(frequency + group * N + n, mask=n < N, other=0.0)
    weight_2 += group * N * N
    weight_3 += group * N * N
    s_0 = _load(positions + group * L * F, t, f, length, F)
    z_1, s_1 = _sine(s_0, weight_1 + group * N * F, bias_1 + group * N, b_frequency, n, f, N, F, PRECISION)
    z_2, s_2 = _sine(s_1, weight_2, bias_2 + group * N, b_frequency, n, n, N, N, PRECISION)
    z_3, s_3 = _sine(s_2, weight_3, bias_3 + group * N, b_frequency, n, n, N, N, PRECISION)
    ds = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = live & (d < D)[None, :]
        slope = tl.load(dh + group * D * length + d[None, :] * length + t[:, None], mask=mask, other=0.0)
        slope *= _load(window + group * L * D, t, d, length, D)
        ds = tl.dot(slope, _load(out_weight + group * D * N, d, n, D, N), ds, input_precision=PRECISION)
        dout = tl.dot(tl.trans(slope), s_3, input_precision=PRECISION)
        at = dout_weight + part * D * N + d[:, None] * N + n[None, :]
        tl.store(at, dout, mask=(d < D)[:, None] & (n < N)[None, :])
    ds, dfrequency_3 = _back(
        ds, z_3, s_2, weight_3, dweight_3 + part * N * N, dbias_3 + part * N, b_frequency, n, n, N, N, PRECISION
    )
    ds, dfrequency_2 = _back(
        ds, z_2, s_1, weight_2, dweight_2 + part * N * N, dbias_2 + part * N, b_frequency, n, n, N, N, PRECISION
    )
    _, dfrequency_1 = _back(
        ds, z_1, s_0, weight_1 + group * N * F, dweight_1 + part * N * F, dbias_1 + part * N, b_frequency, n, f, N, F,
        PRECISION,
    )  # fmt: skip
    tl.store(dfrequency + part * N + n, dfrequency_1 + dfrequency_2 + dfrequency_3, mask=n < N)
