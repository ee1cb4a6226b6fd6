"""A program has one system, its states side by side, and a block of taps at a time; complex numbers are pairs."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier


@triton.jit
def _multiply(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _phi(a_re, a_im):
    """phi(a) = (e^a - 1) / a and its derivative (e^a - phi) / a, by their series where these differences cancel."""
    size = a_re * a_re + a_im * a_im
    near = size < 0.25
    far = tl.where(near, 1.0, size)
    grown = tl.exp(a_re)
    e_re, e_im = grown * tl.cos(a_im), grown * tl.sin(a_im)
    phi_re, phi_im = _multiply(e_re - 1, e_im, a_re / far, -a_im / far)
    slope_re, slope_im = _multiply(e_re - phi_re, e_im - phi_im, a_re / far, -a_im / far)
    # phi = sum of a^k / (k + 1)!, k up to 8, as nested products.
    sum_re, sum_im = tl.full(a_re.shape, 1.0, tl.float32), tl.zeros(a_re.shape, tl.float32)
    dsum_re, dsum_im = tl.zeros(a_re.shape, tl.float32), tl.zeros(a_re.shape, tl.float32)
    for step in tl.static_range(9):
        # s <- 1 + a s / k, and its derivative s' <- (s + a s') / k.
        moved_re, moved_im = _multiply(a_re, a_im, dsum_re, dsum_im)
        dsum_re, dsum_im = (sum_re + moved_re) / (10 - step), (sum_im + moved_im) / (10 - step)
        sum_re, sum_im = _multiply(a_re, a_im, sum_re, sum_im)
        sum_re, sum_im = 1 + sum_re / (10 - step), sum_im / (10 - step)
    phi_re, phi_im = tl.where(near, sum_re, phi_re), tl.where(near, sum_im, phi_im)
    return phi_re, phi_im, tl.where(near, dsum_re, slope_re), tl.where(near, dsum_im, slope_im)


@triton.jit
def _system(log_dt, log_A_real, A_imag, C, at, n, N: tl.constexpr):
    """Of the system: dt; A, dt A and C of each state."""
    dt = tl.exp(tl.load(log_dt + at))
    A_re = -tl.exp(tl.load(log_A_real + at * N + n, mask=n < N, other=0.0))
    A_im = tl.load(A_imag + at * N + n, mask=n < N, other=0.0)
    C_re = tl.load(C + (at * N + n) * 2, mask=n < N, other=0.0)
    C_im = tl.load(C + (at * N + n) * 2 + 1, mask=n < N, other=0.0)
    return dt, A_re, A_im, dt * A_re, dt * A_im, C_re, C_im


@triton.jit
def _powers(start, a_re, a_im, BLOCK: tl.constexpr):
    """exp(j a) for the BLOCK taps j from `start` on, and j."""
    j = (start + tl.arange(0, BLOCK)).to(tl.float32)
    size, angle = tl.exp(j[:, None] * a_re[None, :]), j[:, None] * a_im[None, :]
    return size * tl.cos(angle), size * tl.sin(angle), j


@kernel
def forward_kernel(
    log_dt, log_A_real, A_imag, C, K, length, blocks, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a system and BLOCK taps."""
    wait_for_earlier()
    at = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    n = tl.arange(0, BLOCK_N)
    dt, _, _, a_re, a_im, C_re, C_im = _system(log_dt, log_A_real, A_imag, C, at, n, N)
    phi_re, phi_im, _, _ = _phi(a_re, a_im)
    B_re, B_im = _multiply(C_re, C_im, dt * phi_re, dt * phi_im)
    E_re, E_im, _ = _powers(start, a_re, a_im, BLOCK)
    taps = start + tl.arange(0, BLOCK)
    tl.store(K + at * length + taps, 2 * tl.sum(B_re[None, :] * E_re - B_im[None, :] * E_im, 1), mask=taps < length)


@kernel
def backward_kernel(
    log_dt, log_A_real, A_imag, C, dK, dlog_dt, dlog_A_real, dA_imag, dC, length,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a system. A gradient dz is d/dRe(z) + i d/dIm(z): that of u in z = u v is dz times conj(v)."""
    wait_for_earlier()
    at = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    dt, A_re, A_im, a_re, a_im, C_re, C_im = _system(log_dt, log_A_real, A_imag, C, at, n, N)
    phi_re, phi_im, slope_re, slope_im = _phi(a_re, a_im)
    B_re, B_im = _multiply(C_re, C_im, dt * phi_re, dt * phi_im)
    # Sums over taps of dK_j conj(E_j), and of j times that.
    zeros = tl.zeros([BLOCK_N], tl.float32)
    s_re, s_im, js_re, js_im = zeros, zeros, zeros, zeros
    for start in range(0, length, BLOCK):
        E_re, E_im, j = _powers(start, a_re, a_im, BLOCK)
        taps = start + tl.arange(0, BLOCK)
        dK_j = 2 * tl.load(dK + at * length + taps, mask=taps < length, other=0.0)
        s_re += tl.sum(dK_j[:, None] * E_re, 0)
        s_im -= tl.sum(dK_j[:, None] * E_im, 0)
        js_re += tl.sum((dK_j * j)[:, None] * E_re, 0)
        js_im -= tl.sum((dK_j * j)[:, None] * E_im, 0)
    # B = C dt phi(a), and K depends on B and, through the powers, on a = dt A.
    dC_re, dC_im = _multiply(s_re, s_im, dt * phi_re, -dt * phi_im)
    dF_re, dF_im = _multiply(s_re, s_im, C_re, -C_im)
    da_re, da_im = _multiply(js_re, js_im, B_re, -B_im)
    through_re, through_im = _multiply(dF_re, dF_im, dt * slope_re, -dt * slope_im)
    da_re += through_re
    da_im += through_im
    live = n < N
    ddt = tl.sum(tl.where(live, da_re * A_re + da_im * A_im + dF_re * phi_re + dF_im * phi_im, 0.0), 0)
    tl.store(dlog_dt + at, ddt * dt)
    tl.store(dlog_A_real + at * N + n, dt * da_re * A_re, mask=live)
    tl.store(dA_imag + at * N + n, dt * da_im, mask=live)
    tl.store(dC + (at * N + n) * 2, dC_re, mask=live)
    tl.store(dC + (at * N + n) * 2 + 1, dC_im, mask=live)
