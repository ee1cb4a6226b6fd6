"""The definition."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def mingru_inputs(candidate: Tensor, gate: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    gate = gate.to(state_dtype(gate.dtype))
    dt = torch.logaddexp(gate, torch.zeros_like(gate)).clamp(min=smallest)
    return (candidate * (-torch.expm1(-dt) / dt)).to(candidate.dtype), dt
