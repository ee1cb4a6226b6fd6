"""Averages that forget at fixed, learned rates: the simplest recurrence that can be trained, on zoo's shared kernel."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from zoo import LayerInfo, Mixer
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.mixers import head_dim


class LeakyAverage(Mixer):
    """S_t = a_h S_{t-1} + (1 - a_h) W_v x_t for each head h, y_t = W_o (S_t silu(W_g x_t)).

    An exponential moving average, as in MEGA (arXiv 2209.10655), with one decay a_h = exp(-1 / tau_h) per head. tau_h,
    in tokens, is learned; it starts spread over 1 to max_seq_len, evenly in the logarithm.
    """

    class Config(Mixer.Config):
        num_heads: int = Field(8, ge=1, description="Groups of channels, each with a rate of forgetting of its own.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        head_dim(layer.d_model, config.num_heads)
        self.inp = nn.Linear(layer.d_model, 2 * layer.d_model)
        self.out = nn.Linear(layer.d_model, layer.d_model)
        self.log_tau = nn.Parameter(torch.linspace(0, math.log(layer.max_seq_len), config.num_heads))

    def forward(self, x: Tensor) -> Tensor:
        return self.average(x, None, return_state=False)[0]

    def prefill(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, after = self.average(x, state, return_state=True)
        assert after is not None
        return y, after

    def init_state(self, batch_size: int) -> Tensor:
        heads = self.config.num_heads
        return self.log_tau.new_zeros(batch_size, heads, 1, self.layer.d_model // heads)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state

    def average(self, x: Tensor, state: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor | None]:
        v, gate = self.inp(x).chunk(2, dim=-1)
        v = v.unflatten(-1, (self.config.num_heads, -1))
        log_decay = -torch.exp(-self.log_tau)
        v = v * -torch.expm1(log_decay)[:, None].to(v)
        one = v.new_ones(*v.shape[:-1], 1)
        average, after = linear_recurrence(one, one, v, log_decay, initial_state=state, return_state=return_state)
        return self.out(average.flatten(2) * silu(gate)), after
