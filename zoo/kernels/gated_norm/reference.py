"""The definition, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def gated_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    gate_first: bool,
    scale: float,
    eps: float,
) -> Tensor:
    wide = state_dtype(x.dtype)
    u = x.to(wide)
    opened = 1 if gate is None else gate.to(wide) * torch.sigmoid(gate.to(wide))
    if gate_first:
        u = u * opened
    if kind == "layer":
        u = u - u.mean(-1, keepdim=True)
    y = scale * u / (u.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return (y if gate_first else y * opened).to(x.dtype)
