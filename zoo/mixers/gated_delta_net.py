"""Gated DeltaNet: the delta rule, which overwrites one key, with a decay, which lets go of all of them."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.kernels.activation import activation
from zoo.kernels.gated_norm import gated_norm
from zoo.mixers.base import LayerInfo
from zoo.mixers.delta_net import DeltaNet
from zoo.mixers.recurrent import Pick


class GatedDeltaNet(DeltaNet):
    """`DeltaNet` with a decay per step and head, and a gate (arXiv 2412.06464, eq. 10 and section 3.4).

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        log alpha_t = -exp(A) softplus(W_a x_t + b);   y_t = W_o [RMSNorm(S_t^T q_t) w * silu(W_g x_t)]

    Initialised like `DeltaNet`, with exp(A) uniform up to 16 and softplus(b) log-uniform in [0.001, 0.1].
    """

    class Config(DeltaNet.Config):
        expand_v: float = Field(2.0, gt=0, description="Value channels, of all heads, per channel of the model.")
        gate: bool = Field(True, description="silu(W_g x) on the output; the published MQAR runs have none.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D, H = layer.d_model, config.num_heads
        self.alpha = nn.Linear(D, H, bias=False)
        # Off 0, whose logarithm is not finite.
        self.A_log = nn.Parameter(torch.empty(H).uniform_(0.01, 16).log())
        dt = torch.empty(H).uniform_(math.log(1e-3), math.log(0.1)).exp()
        # The inverse of softplus.
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.gate = nn.Linear(D, self.splits[2], bias=False) if config.gate else None
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def layers(self) -> list[nn.Linear]:
        return [*super().layers(), self.alpha, *([] if self.gate is None else [self.gate])]

    def decay(self, projected: list[Tensor]) -> Tensor:
        return self.A_log.exp() * activation(projected[0], self.dt_bias, "softplus", scale=-1.0)

    def readout(self, o: Tensor, projected: list[Tensor], pick: Pick) -> Tensor:
        return gated_norm(o, None if self.gate is None else pick(projected[1]).view_as(o), self.norm_weight)
