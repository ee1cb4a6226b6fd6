"""Channel statistics written out."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


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
    wide = state_dtype(x.dtype)
    stream = x.to(wide) if branch is None else x.to(wide) + branch.to(wide)
    centred = stream - stream.mean(-1, keepdim=True) if kind == "layer" else stream
    normed = weight.to(wide) * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    kept = stream.to(x.dtype)
    if positions is not None:
        kept = torch.stack([rows[asked] for rows, asked in zip(kept, positions, strict=True)])
    return kept, (normed if bias is None else normed + bias.to(wide)).to(dtype)
