"""One product, and a view of the queries."""

from __future__ import annotations

from torch import Tensor


def shared_keys(C: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    k = (dt.unflatten(-1, (B.shape[2], -1, 1)) * B[:, :, :, None]).to(B.dtype)
    return C[:, :, :, None].expand_as(k).flatten(2, 3), k.flatten(2, 3)
