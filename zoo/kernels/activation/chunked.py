"""torch's own functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.backend import state_dtype

FUNCTIONS = {"softplus": F.softplus, "logsigmoid": F.logsigmoid, "sigmoid": torch.sigmoid, "exp": torch.exp}


def activation(x: Tensor, bias: Tensor, kind: str, scale: float) -> Tensor:
    y = FUNCTIONS[kind](x.to(state_dtype(x.dtype)) + bias)
    return y if scale == 1 else scale * y
