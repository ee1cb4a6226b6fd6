"""torch's own norms."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

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
    opened = None if gate is None else F.silu(gate.to(wide))
    if gate_first and opened is not None:
        u, opened = u * opened, None
    norm = F.layer_norm if kind == "layer" else F.rms_norm
    y = norm(u, u.shape[-1:], eps=eps)
    if weight is not None:
        y = y * (weight if scale == 1 else weight * scale)
    elif scale != 1:
        y = y * scale
    if bias is not None:
        y = y + bias
    return (y if opened is None else y * opened).to(x.dtype)
