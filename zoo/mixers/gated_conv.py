"""Gated short convolution: Zoology's BaseConv, which compares neighbours and so prepares what attention recalls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.kernels.short_conv import MAX_WIDTH, short_conv
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import RecurrentMixer


class GatedConvState(NamedTuple):
    """conv (B, W-1, D): inputs that the convolution still needs."""

    conv: Tensor


class GatedConv(RecurrentMixer):
    """y_t = (P x_t + b_1) * (sum_{j < W} h_j * x_{t-j} + b_2), products of channels (arXiv 2312.04927, eq. 2).

    The layer that BASED alternates with linear attention (arXiv 2402.18668, W = 3). Initialised as in the published
    MQAR runs: P as N(0, 0.02^2), b_1 = 0, the convolution by torch's default for Conv1d.
    """

    class Config(RecurrentMixer.Config):
        conv_width: int = Field(3, ge=1, le=MAX_WIDTH, description="W, taps of the convolution; the cache is W - 1.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        self.projection = nn.Linear(layer.d_model, layer.d_model)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)
        bound = config.conv_width**-0.5
        self.conv_weight = nn.Parameter(torch.empty(layer.d_model, config.conv_width).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(layer.d_model).uniform_(-bound, bound))

    def init_state(self, batch_size: int) -> GatedConvState:
        return GatedConvState(self.conv_weight.new_zeros(batch_size, self.config.conv_width - 1, self.layer.d_model))

    def mix(self, x: Tensor, state: GatedConvState | None, return_state: bool) -> tuple[Tensor, GatedConvState | None]:
        y, cache = short_conv(
            x,
            self.conv_weight,
            self.conv_bias,
            gate=self.projection(x),
            initial_state=None if state is None else state.conv,
            return_state=return_state,
        )
        return y, None if cache is None else GatedConvState(cache)
