"""W shifted multiply-adds over the whole sequence, with the gradient written out.

On a CPU this is two to three times as fast, forward and backward, as `conv1d` with one group a channel, or as the same
multiply-adds under autograd, which keep one product a tap.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.backend import state_dtype


class _Conv(torch.autograd.Function):
    """x (B, T, D), weight (D, W), bias (D,) or None -> y (B, T, D): zeros before x, no activation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        T = x.shape[1]
        tap, *earlier_taps = weight.flip(1).unbind(1)
        y = x * tap if bias is None else torch.addcmul(bias, x, tap)
        for j, tap in enumerate(earlier_taps[: T - 1], start=1):
            y[:, j:].addcmul_(x[:, : T - j], tap)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        T = x.shape[1]
        tap, *earlier_taps = weight.flip(1).unbind(1)
        dx = dy * tap
        for j, tap in enumerate(earlier_taps[: T - 1], start=1):
            dx[:, : T - j].addcmul_(dy[:, j:], tap)
        dtaps = [(dy[:, j:] * x[:, : max(T - j, 0)]).sum((0, 1)) for j in range(weight.shape[1])]
        return dx, torch.stack(dtaps[::-1], dim=1), dy.sum((0, 1)) if ctx.has_bias else None


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    past = weight.shape[1] - 1
    dtype = state_dtype(x.dtype)
    seen = x if initial_state is None else torch.cat([initial_state.to(x.dtype), x], dim=1)
    y = _Conv.apply(seen.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if initial_state is not None:
        y = y[:, past:]
    if activation == "silu":
        y = F.silu(y)
    cache = None
    if return_state:
        T = seen.shape[1]
        # F.pad copies even where it pads nothing: a slice would keep the whole sequence alive.
        cache = F.pad(seen[:, max(T - past, 0) :], (0, 0, max(past - T, 0), 0))
    return y.to(x.dtype), cache
