"""torch's own norms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def residual_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    stream = x if branch is None else x + branch.to(x.dtype)
    if kind == "layer":
        return stream, F.layer_norm(stream, weight.shape, weight, bias, eps).to(dtype)
    normed = F.rms_norm(stream, weight.shape, weight, eps)
    return stream, (normed if bias is None else normed + bias).to(dtype)
