"""torch's own functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.backend import state_dtype


def mingru_inputs(candidate: Tensor, gate: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    dt = F.softplus(gate.to(state_dtype(gate.dtype))).clamp(min=smallest)
    return (candidate * (-torch.expm1(-dt) / dt)).to(candidate.dtype), dt
