"""The definition, tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor


def ssm_kernel(log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, length: int) -> Tensor:
    A = torch.complex(-log_A_real.double().exp(), A_imag.double())
    a = log_dt.double().exp()[:, None] * A
    B = torch.view_as_complex(C.double()) * torch.expm1(a) / A
    return torch.stack([2 * (B * torch.exp(j * a)).sum(1).real for j in range(length)], dim=1).to(log_dt.dtype)
