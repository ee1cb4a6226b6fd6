"""All outer products at once, as channels of one long convolution."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.backend import state_dtype
from zoo.kernels.long_conv import long_conv


def outer_conv(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
    kv_BTIJH = (k.permute(0, 3, 1, 2)[:, :, :, None] * v[:, :, None]).to(k.dtype)
    pairs = k.shape[1] * v.shape[2]
    s = long_conv(kv_BTIJH.flatten(2), kernel.repeat(pairs, 1), skip.repeat(pairs), impl="chunked").view_as(kv_BTIJH)
    return (q[:, :, :, None] * s).sum(2, dtype=state_dtype(s.dtype)).to(q.dtype)
