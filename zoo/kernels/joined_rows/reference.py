"""A product with one-hot rows."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.backend import state_dtype


def joined_rows(x: Tensor, branch: Tensor | None, positions: Tensor) -> Tensor:
    wide = state_dtype(x.dtype)
    stream = x.to(wide) if branch is None else x.to(wide) + branch.to(wide)
    return (F.one_hot(positions, x.shape[1]).to(wide) @ stream).to(x.dtype)
