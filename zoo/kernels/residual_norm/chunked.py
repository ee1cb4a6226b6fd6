"""torch's own norms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.gather_rows import gather_rows


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    kind: str,
    eps: float,
    dtype: torch.dtype,
    lookup: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    stream = x if branch is None else x + branch.to(x.dtype)
    kept = stream if positions is None else gather_rows(stream, positions, impl="chunked")
    if kind == "layer":
        return kept, F.layer_norm(stream, weight.shape, weight, bias, eps).to(dtype)
    normed = F.rms_norm(stream, weight.shape, weight, eps)
    return kept, (normed if bias is None else normed + bias).to(dtype)
