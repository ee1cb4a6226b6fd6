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
        T, D = x.shape[1:]
        rows, (tap, *earlier_taps) = x.flatten(1), _rows_of_taps(weight, T)
        y = rows * tap if bias is None else torch.addcmul(bias.expand(T, D).reshape(-1), rows, tap)
        for j, tap in enumerate(earlier_taps, start=1):
            y[:, j * D :].addcmul_(rows[:, : (T - j) * D], tap[: (T - j) * D])
        return y.view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        T, D = x.shape[1:]
        rows, slopes, (tap, *earlier_taps) = x.flatten(1), dy.flatten(1), _rows_of_taps(weight, T)
        dx = slopes * tap
        dtaps = [_over_time(slopes * rows, D)]
        for j, tap in enumerate(earlier_taps, start=1):
            here, later = slice((T - j) * D), slice(j * D, None)
            dx[:, here].addcmul_(slopes[:, later], tap[here])
            dtaps.append(_over_time(slopes[:, later] * rows[:, here], D))
        dtaps += [torch.zeros_like(dtaps[0])] * (weight.shape[1] - len(dtaps))
        return dx.view(x.shape), torch.stack(dtaps[::-1], dim=1), _over_time(slopes, D) if ctx.has_bias else None


def _rows_of_taps(weight: Tensor, T: int) -> tuple[Tensor, ...]:
    """Each tap (T D), once for every token: the latest first, and no more of them than tokens.

    So sequences are rows (B, T D), and a shift in time a slice of them: long, contiguous operations.
    """
    D, W = weight.shape
    return weight.T[:, None].expand(W, T, D).reshape(W, T * D).unbind(0)[::-1][:T]


def _over_time(rows: Tensor, D: int) -> Tensor:
    """(B, T D) summed over sequences and time: (D,)."""
    return rows.reshape(-1, D).sum(0)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
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
    y = y.to(x.dtype)
    return y if gate is None else gate * y, cache
