"""exp(j a) = exp(16 i a) exp(r a): two short lists of powers and a product instead of all the exponentials."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16


def ssm_kernel(log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, length: int) -> Tensor:
    A = torch.complex(-torch.exp(log_A_real), A_imag)
    log_decay = torch.exp(log_dt)[:, None] * A
    scaled = torch.view_as_complex(C) * torch.expm1(log_decay) / A
    coarse_HNi = scaled[..., None] * powers(BLOCK * log_decay, -(-length // BLOCK))
    kernel_Hir = coarse_HNi.mT @ powers(log_decay, BLOCK)
    return 2 * kernel_Hir.real.flatten(1)[:, :length]


def powers(log_base: Tensor, count: int) -> Tensor:
    """exp(log_base)^j for j < count, in a new last axis."""
    return torch.exp(log_base[..., None] * torch.arange(count, device=log_base.device))
