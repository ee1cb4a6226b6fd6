"""Up to DIRECT_TAPS taps or outputs: a product with a Toeplitz matrix, block by block; beyond: the Fourier transform.

The direct form is exactly causal: an output is the same to the last bit whatever comes after it. In the Fourier form
that holds to rounding only, but its cost grows as T log T. Forward and backward on one core, the direct form costs the
same at T = 64, a third more at 256, twice as much at 512 and five times as much at 1024. Both write their gradient
out, which takes a third off the Fourier form under autograd.

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
    """u (B, P+T, D), kernel (D, L), L <= P+T, T -> the last T outputs y (B, T, D).

    `hankel` (D, L+c-1, c) holds kernel[:, i + j - (c-1)] at i, j. With its rows reversed it maps the inputs of a block,
    the last of them being the block's own, to its outputs; with its columns reversed, the gradients of the outputs
    that some inputs reach to those of the inputs.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor, T: int) -> Tensor:
        seen, L, block = u.shape[1], kernel.shape[1], min(BLOCK, T)
        u_DBT = _channels_first(u)
        hankel = F.pad(kernel, (block - 1, block - 1)).unfold(1, block, 1)
        toeplitz = hankel.flip(1)
        y_DBT = u_DBT.new_empty(*u_DBT.shape[:2], T)
        for start in range(seen - T, seen, block):
            stop, first, row = min(start + block, seen), max(0, start - L + 1), max(0, L - 1 - start)
            outputs = slice(start - seen + T, stop - seen + T)
            y_DBT[:, :, outputs] = u_DBT[:, :, first:stop] @ toeplitz[:, row : row + stop - first, : stop - start]
        ctx.save_for_backward(u_DBT, hankel)
        return _channels_last(y_DBT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        u_DBT, hankel = ctx.saved_tensors
        D, _, seen = u_DBT.shape
        rows, block = hankel.shape[1:]
        L, T = rows - block + 1, dy.shape[1]
        # The outputs that were not asked for have no gradient.
        dy_DBT = F.pad(_channels_first(dy), (seen - T, 0))
        toeplitz = hankel.flip(2)
        du_DBT = torch.empty_like(u_DBT)
        for start in range(0, seen, block):
            stop, reach = min(start + block, seen), min(start + rows, seen)
            du_DBT[:, :, start:stop] = dy_DBT[:, :, start:reach] @ toeplitz[:, : reach - start, : stop - start]
        dtoeplitz_DcL = dy.new_zeros(D, block, rows)
        for start in range(seen - T, seen, block):
            stop, first, row = min(start + block, seen), max(0, start - L + 1), max(0, L - 1 - start)
            part = dtoeplitz_DcL[:, : stop - start, row : row + stop - first]
            part.baddbmm_(dy_DBT[:, :, start:stop].mT, u_DBT[:, :, first:stop])
        # Row j shifted right by j, so that the places of one tap stand in one column.
        shifted = F.pad(dtoeplitz_DcL.flip(2), (0, block)).flatten(1)[:, :-block].view(D, block, rows + block - 1)
        return _channels_last(du_DBT), shifted.sum(1)[:, block - 1 : block - 1 + L], None


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


def long_conv(
    u: Tensor, kernel: Tensor, skip: Tensor | None, gate: Tensor | None, past: Tensor | None, time_last: bool
) -> Tensor:
    T = u.shape[1]
    dtype = state_dtype(u.dtype)
    x = u.to(dtype)
    seen = x if past is None else torch.cat([past.to(dtype), x], dim=1)
    taps = kernel[:, : seen.shape[1]].to(dtype)
    if min(taps.shape[1], T) <= DIRECT_TAPS:
        y = _Direct.apply(seen, taps, T)
    else:
        y = _Fourier.apply(seen, taps)[:, seen.shape[1] - T :]
    if skip is not None:
        y = torch.addcmul(y, x, skip.to(dtype))
    if gate is not None:
        y = y * gate.to(dtype)
    return (y.mT if time_last else y).to(u.dtype)
