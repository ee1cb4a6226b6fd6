"""All products at once."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import state_dtype


def outer_product(k: Tensor, v: Tensor) -> Tensor:
    return (k[:, :, :, None] * v[:, :, None]).to(k.dtype)


def read_product(q: Tensor, s: Tensor) -> Tensor:
    return (q[:, :, :, None] * s).sum(2, dtype=state_dtype(s.dtype)).to(q.dtype)
