"""Mamba-2: a state space model whose decay is one number per head, and so linear attention with a gate."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ConfigError
from zoo.kernels.backend import state_dtype
from zoo.kernels.gated_norm import gated_norm
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.kernels.projections import projections
from zoo.kernels.short_conv import short_conv
from zoo.kernels.ssd_inputs import ssd_inputs
from zoo.kernels.streams import join, lane
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import Pick, ReadoutMixer, beside, everywhere


class Mamba2State(NamedTuple):
    """conv (B, W-1, channels): inputs that the convolution still needs. ssm (B, H, N, P), fp32 (fp64 for fp64)."""

    conv: Tensor
    ssm: Tensor


class Mamba2(ReadoutMixer):
    """The Mamba-2 block around SSD (arXiv 2405.21060, eq. 16 and section 7), D_h a skip connection.

        z, xBC, dt = W_in u;   x, B, C = silu(conv(xBC));   dt = softplus(dt + b)
        S_t = exp(-dt_t exp(A_h)) S_{t-1} + B_t (dt_t x_t)^T;   y_t = S_t^T C_t + D_h x_t       per head h
        out = W_out (RMSNorm(y * silu(z)) * w)

    B and C (N channels) are shared by the heads of a group, which the norm treats apart. Initialised as in the
    official code: dt log-uniform in [0.001, 0.1], exp(A) uniform in [1, 16], D = 1, torch's defaults elsewhere and
    W_out divided by sqrt(depth).
    """

    class Config(ReadoutMixer.Config):
        d_state: int = Field(
            128, ge=1, description="N, the state's size per channel; the published MQAR runs: 8 to 24."
        )
        expand: int = Field(2, ge=1, description="Inner channels per channel of the model.")
        head_dim: int = Field(64, ge=1, description="P, inner channels of a head.")
        num_groups: int = Field(1, ge=1, description="Groups of heads that share B and C.")
        conv_width: int = Field(4, ge=1, le=8, description="W, taps of the short convolution.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        inner = config.expand * layer.d_model
        self.num_heads = divide(inner, config.head_dim, f"expand {config.expand} x d_model {layer.d_model}", "head_dim")
        divide(self.num_heads, config.num_groups, f"{inner} channels / head_dim {config.head_dim}", "num_groups")
        self.splits = [inner, inner + 2 * config.num_groups * config.d_state, self.num_heads]
        self.in_proj = nn.Linear(layer.d_model, sum(self.splits), bias=False)
        bound = config.conv_width**-0.5
        self.conv_weight = nn.Parameter(torch.empty(self.splits[1], config.conv_width).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(self.splits[1]).uniform_(-bound, bound))
        dt = torch.empty(self.num_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        # The inverse of softplus.
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, layer.d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(layer.depth)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def init_state(self, batch_size: int) -> Mamba2State:
        weight, config = self.in_proj.weight, self.config
        return Mamba2State(
            weight.new_zeros(batch_size, config.conv_width - 1, self.splits[1]),
            weight.new_zeros(
                batch_size, self.num_heads, config.d_state, config.head_dim, dtype=state_dtype(weight.dtype)
            ),
        )

    def mix(
        self, x: Tensor, state: Mamba2State | None, return_state: bool, pick: Pick = everywhere
    ) -> tuple[Tensor, Mamba2State | None]:
        G, N, H = self.config.num_groups, self.config.d_state, self.num_heads
        cache, ssm = (None, None) if state is None else state
        inner, convolved, _ = self.splits
        sizes = [inner, convolved - inner]
        W_z, *others = self.in_proj.weight.split([inner, *sizes, H])
        if pick is everywhere:
            z, x, BC, dt = projections(x, W_z, *others)
        else:
            (x,), (asked,) = beside(pick, x)
            z = F.linear(asked, W_z)
            x, BC, dt = projections(x, *others)
        taps = zip(self.conv_weight.split(sizes), self.conv_bias.split(sizes), strict=True)
        caches = (None, None) if cache is None else cache.split(sizes, dim=-1)
        # Apart, so that their gradients need not be put together and neither waits for the other.
        conv_x, conv_BC = (
            functools.partial(short_conv, y, *tap, "silu", initial_state=before, return_state=return_state)
            for y, tap, before in zip((x, BC), taps, caches, strict=True)
        )
        with lane(x, "keys"):
            mixed, BC_cache = conv_BC()
            # The step multiplies B, which has fewer channels than x in all but the largest states.
            q, k, decay = ssd_inputs(mixed.unflatten(-1, (2, G, N)), dt, self.dt_bias, self.A_log)
        x, x_cache = conv_x()
        join(x, "keys")
        x = x.unflatten(-1, (H, -1))
        y, ssm = linear_recurrence(q, k, x, decay, skip=self.D, initial_state=ssm, return_state=return_state)
        y, z = (t.unflatten(-1, (G, -1)) for t in (pick(y.flatten(2)), z))
        y = self.out_proj(gated_norm(y, z, self.norm_weight.view(G, -1), gate_first=True).flatten(2))
        if x_cache is None or BC_cache is None or ssm is None:
            return y, None
        return y, Mamba2State(torch.cat([x_cache, BC_cache], dim=-1), ssm)


def divide(total: int, part: int, what: str, field: str) -> int:
    """total / part. Raises ConfigError when that is not whole."""
    if total % part:
        allowed = [n for n in range(1, total + 1) if total % n == 0]
        raise ConfigError(f"mamba2: {what} = {total} is not divisible by {field} {part}; use one of {allowed}.")
    return total // part
