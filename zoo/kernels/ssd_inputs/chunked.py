"""Products, and a view of the queries."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.backend import state_dtype


def ssd_inputs(BC: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, C = BC.unbind(2)
    step = F.softplus(dt.to(state_dtype(dt.dtype)) + bias)
    k = (step.unflatten(-1, (B.shape[2], -1, 1)) * B[:, :, :, None]).to(B.dtype)
    return C[:, :, :, None].expand_as(k).flatten(2, 3), k.flatten(2, 3), step * -log_A.exp()
