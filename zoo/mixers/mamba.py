"""Mamba: a state space model whose step, input and output depend on the token."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.backend import state_dtype
from zoo.kernels.projections import projections
from zoo.kernels.selective_inputs import selective_inputs
from zoo.kernels.selective_scan import selective_scan
from zoo.kernels.short_conv import MAX_WIDTH, short_conv
from zoo.kernels.streams import join, lane
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import Pick, ReadoutMixer, beside, everywhere


class MambaState(NamedTuple):
    """conv (B, W-1, E): inputs that the convolution still needs. ssm (B, E, N), fp32 (fp64 for fp64)."""

    conv: Tensor
    ssm: Tensor


class Mamba(ReadoutMixer):
    """The Mamba block (arXiv 2312.00752, algorithm 2 and section 3.4), E = expand * d_model inner channels.

        x, z = W_in u;   x = silu(conv(x));   dt, B, C = W_x x;   dt = softplus(W_dt dt + b_dt)
        h_t = exp(-dt_t exp(A)) h_{t-1} + dt_t B_t x_t;   y_t = C_t . h_t + D x_t       N states per channel
        out = W_out (y * silu(z))

    Initialised as in the official code: A = -(1..N) (S4D-Real), D = 1, W_dt uniform in +-rank^-1/2, b_dt so that the
    steps are log-uniform in [0.001, 0.1], torch's defaults elsewhere, and W_out divided by sqrt(depth).
    """

    class Config(ReadoutMixer.Config):
        d_state: int = Field(
            16, ge=1, description="N, states per inner channel: the dial; the published MQAR runs: 8 to 24."
        )
        expand: int = Field(2, ge=1, description="Inner channels per channel of the model.")
        dt_rank: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
            "auto", description="Rank of the projection to the steps; auto: ceil(d_model / 16)."
        )
        conv_width: int = Field(4, ge=1, le=MAX_WIDTH, description="W, taps of the short convolution.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        inner = config.expand * layer.d_model
        rank = math.ceil(layer.d_model / 16) if config.dt_rank == "auto" else config.dt_rank
        self.in_proj = nn.Linear(layer.d_model, 2 * inner, bias=False)
        bound = config.conv_width**-0.5
        self.conv_weight = nn.Parameter(torch.empty(inner, config.conv_width).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(inner).uniform_(-bound, bound))
        self.x_proj = nn.Linear(inner, rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, config.d_state + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, layer.d_model, bias=False)
        dt = torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)).exp()
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            # The inverse of softplus.
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.out_proj.weight /= math.sqrt(layer.depth)
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def init_state(self, batch_size: int) -> MambaState:
        inner, N = self.A_log.shape
        return MambaState(
            self.conv_weight.new_zeros(batch_size, self.config.conv_width - 1, inner),
            self.A_log.new_zeros(batch_size, inner, N, dtype=state_dtype(self.A_log.dtype)),
        )

    def mix(
        self, x: Tensor, state: MambaState | None, return_state: bool, pick: Pick = everywhere
    ) -> tuple[Tensor, MambaState | None]:
        cache, ssm = (None, None) if state is None else state
        with lane(x, "decay"):
            A = -torch.exp(self.A_log)
        W_x, W_z = self.in_proj.weight.chunk(2)
        if pick is everywhere:
            x, z = projections(x, W_x, W_z)
        else:
            (x,), (asked,) = beside(pick, x)
            x, z = F.linear(x, W_x), F.linear(asked, W_z)
        x, cache = short_conv(
            x, self.conv_weight, self.conv_bias, "silu", initial_state=cache, return_state=return_state
        )
        # As in the official kernel, the step is rounded to half precision, if at all, before its bias and softplus.
        x, dt, B, C = selective_inputs(x, self.x_proj.weight, self.dt_proj.weight)
        join(x, "decay")
        # The scan gates its output, unless few positions of it are asked for.
        gate = z if pick is everywhere else None
        y, ssm = selective_scan(
            x, dt, A, B, C, self.D, gate, dt_bias=self.dt_proj.bias, initial_state=ssm, return_state=return_state
        )
        if gate is None:
            y = pick(y) * F.silu(z)
        return self.out_proj(y), None if cache is None or ssm is None else MambaState(cache, ssm)
