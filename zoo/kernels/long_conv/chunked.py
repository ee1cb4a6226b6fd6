"""Up to DIRECT_TAPS taps: a product with a Toeplitz matrix, block by block; beyond: the Fourier transform.

The direct form is exactly causal: an output is the same to the last bit whatever comes after it. In the Fourier form
that holds to rounding only, but its cost grows as T log T. On one core the direct form costs the same at T = 64, a
quarter more at 256, twice as much at 512 and five times as much at 1024. Both write their gradient out, which halves
the time of the Fourier form under autograd.

Letters: B batch, T time, D channels, L taps, c outputs of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels.backend import state_dtype

DIRECT_TAPS = 512
BLOCK = 32


def _channels_first(x_BTD: Tensor) -> Tensor:
    """(B, T, D) -> (D, B, T), as the transpose of a matrix: many times as fast as a permuted copy."""
    B, T, D = x_BTD.shape
    return x_BTD.reshape(B * T, D).t().contiguous().view(D, B, T)


def _channels_last(x_DBT: Tensor) -> Tensor:
    """(D, B, T) -> (B, T, D)."""
    D, B, T = x_DBT.shape
    return x_DBT.view(D, B * T).t().contiguous().view(B, T, D)


class _Direct(torch.autograd.Function):
    """u (B, T, D), kernel (D, L), L <= T -> y (B, T, D).

    `hankel` (D, L+c-1, c) holds kernel[:, i + j - (c-1)] at i, j. With its rows reversed it maps the inputs of a block,
    the last of them being the block's own, to its outputs; with its columns reversed, the gradients of the outputs
    that a block reaches to those of its inputs.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor) -> Tensor:
        T = u.shape[1]
        L = kernel.shape[1]
        u_DBT = _channels_first(u)
        hankel = F.pad(kernel, (BLOCK - 1, BLOCK - 1)).unfold(1, BLOCK, 1)
        toeplitz = hankel.flip(1)
        y_DBT = torch.empty_like(u_DBT)
        for start, stop, first, row in _blocks(T, L):
            rows = slice(row, row + stop - first)
            y_DBT[:, :, start:stop] = u_DBT[:, :, first:stop] @ toeplitz[:, rows, : stop - start]
        ctx.save_for_backward(u_DBT, hankel)
        return _channels_last(y_DBT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        u_DBT, hankel = ctx.saved_tensors
        D, _, T = u_DBT.shape
        rows = hankel.shape[1]
        L = rows - BLOCK + 1
        dy_DBT = _channels_first(dy)
        toeplitz = hankel.flip(2)
        du_DBT = torch.empty_like(u_DBT)
        dtoeplitz_DcL = dy.new_zeros(D, BLOCK, rows)
        for start, stop, first, row in _blocks(T, L):
            reach = min(T, start + rows)
            du_DBT[:, :, start:stop] = dy_DBT[:, :, start:reach] @ toeplitz[:, : reach - start, : stop - start]
            part = dtoeplitz_DcL[:, : stop - start, row : row + stop - first]
            part.baddbmm_(dy_DBT[:, :, start:stop].mT, u_DBT[:, :, first:stop])
        # Row j shifted right by j, so that the places of one tap stand in one column.
        shifted = F.pad(dtoeplitz_DcL.flip(2), (0, BLOCK)).flatten(1)[:, :-BLOCK].view(D, BLOCK, rows + BLOCK - 1)
        return _channels_last(du_DBT), shifted.sum(1)[:, BLOCK - 1 : BLOCK - 1 + L]


def _blocks(T: int, L: int) -> list[tuple[int, int, int, int]]:
    """Each block's outputs (start, stop), the first input that they see, and its row in the Toeplitz matrix."""
    return [
        (start, min(start + BLOCK, T), max(0, start - L + 1), max(0, L - 1 - start)) for start in range(0, T, BLOCK)
    ]


class _Fourier(torch.autograd.Function):
    """u (B, T, D), kernel (D, L), L <= T -> y (B, T, D): a circular convolution of 2T, so that nothing wraps around."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor) -> Tensor:
        T = u.shape[1]
        u_f = torch.fft.rfft(u.mT, n=2 * T)
        kernel_f = torch.fft.rfft(kernel, n=2 * T)
        ctx.save_for_backward(u_f, kernel_f)
        ctx.L = kernel.shape[1]
        return torch.fft.irfft(u_f * kernel_f, n=2 * T)[..., :T].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        u_f, kernel_f = ctx.saved_tensors
        T = dy.shape[1]
        dy_f = torch.fft.rfft(dy.mT, n=2 * T)
        du = torch.fft.irfft(dy_f * kernel_f.conj(), n=2 * T)[..., :T].mT
        dkernel = torch.fft.irfft((dy_f * u_f.conj()).sum(0), n=2 * T)[..., : ctx.L]
        return du, dkernel


def long_conv(u: Tensor, kernel: Tensor, skip: Tensor | None, gate: Tensor | None) -> Tensor:
    dtype = state_dtype(u.dtype)
    x = u.to(dtype)
    taps = kernel[:, : u.shape[1]].to(dtype)
    y = (_Direct if taps.shape[1] <= DIRECT_TAPS else _Fourier).apply(x, taps)
    if skip is not None:
        y = torch.addcmul(y, x, skip.to(dtype))
    if gate is not None:
        y = y * gate.to(dtype)
    return y.to(u.dtype)
