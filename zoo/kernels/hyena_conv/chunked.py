"""Three short convolutions and a long one."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.long_conv import long_conv
from zoo.kernels.short_conv import short_conv


def hyena_conv(x1: Tensor, x2: Tensor, v: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
    def short(x: Tensor, i: int, gate: Tensor | None = None) -> Tensor:
        return short_conv(x, weight[i], bias[i], gate=gate, return_state=False, impl="chunked")[0]

    u = short(v, 2, gate=short(x1, 0))
    return long_conv(u, kernel, skip, short(x2, 1), impl="chunked")
