"""DeltaNet: linear attention that first erases what a key held, so that it can overwrite and not only add."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.kernels.backend import state_dtype
from zoo.kernels.delta_rule import packed_delta_rule
from zoo.kernels.gated_norm import gated_norm
from zoo.kernels.projections import projections
from zoo.kernels.short_conv import MAX_WIDTH, short_conv
from zoo.mixers.base import LayerInfo, head_dim
from zoo.mixers.recurrent import Pick, ReadoutMixer, everywhere


class DeltaNetState(NamedTuple):
    """conv (B, W-1, channels): inputs that the convolution still needs. S (B, H, K, V), fp32 (fp64 for fp64)."""

    conv: Tensor
    S: Tensor


class DeltaNet(ReadoutMixer):
    """y_t = W_o RMSNorm(S_t^T q_t) w per head (arXiv 2406.06484, eq. 4 and section 3.3).

        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   beta_t = sigmoid(W_b x_t)
        q, k, v = silu(conv(W_qkv x));   q and k have length 1, q is then scaled by 1/sqrt(K)

    Projections have no biases. Initialised as in the authors' layer, by torch's defaults for Linear and Conv1d, w = 1.
    """

    class Config(ReadoutMixer.Config):
        num_heads: int = Field(2, ge=1, description="Heads; the published MQAR runs have two.")
        expand_k: float = Field(1.0, gt=0, description="Key channels, of all heads, per channel of the model.")
        expand_v: float = Field(1.0, gt=0, description="Value channels, of all heads, per channel of the model.")
        conv_width: int = Field(4, ge=1, le=MAX_WIDTH, description="W, taps of the convolution; the cache is W - 1.")
        allow_neg_eigval: bool = Field(
            False, description="Double beta: a step may flip what a key held, not only erase it (arXiv 2411.12537)."
        )

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D, H = layer.d_model, config.num_heads
        keys, values = round(config.expand_k * D), round(config.expand_v * D)
        self.key_dim = head_dim(keys, H, f"expand_k {config.expand_k} x d_model {D} =")
        self.value_dim = head_dim(values, H, f"expand_v {config.expand_v} x d_model {D} =")
        self.splits = [keys, keys, values]
        self.qkv = nn.Linear(D, sum(self.splits), bias=False)
        bound = config.conv_width**-0.5
        self.conv_weight = nn.Parameter(torch.empty(sum(self.splits), config.conv_width).uniform_(-bound, bound))
        self.beta = nn.Linear(D, H, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(self.value_dim))
        self.out = nn.Linear(values, D, bias=False)

    def init_state(self, batch_size: int) -> DeltaNetState:
        weight, config = self.out.weight, self.config
        shape = (batch_size, config.num_heads, self.key_dim, self.value_dim)
        return DeltaNetState(
            weight.new_zeros(batch_size, config.conv_width - 1, sum(self.splits)),
            weight.new_zeros(shape, dtype=state_dtype(weight.dtype)),
        )

    def mix(
        self, x: Tensor, state: DeltaNetState | None, return_state: bool, pick: Pick = everywhere
    ) -> tuple[Tensor, DeltaNetState | None]:
        cache, S = (None, None) if state is None else state
        qkv, beta, *others = projections(x, *(layer.weight for layer in self.layers()))
        qkv, cache = short_conv(
            qkv, self.conv_weight, activation="silu", initial_state=cache, return_state=return_state
        )
        beta = torch.sigmoid(beta)
        if self.config.allow_neg_eigval:
            beta = 2 * beta
        o, S = packed_delta_rule(
            qkv, beta, self.decay(others), key_dim=self.key_dim, initial_state=S, return_state=return_state
        )
        y = self.out(self.readout(pick(o), others, pick).flatten(2))
        return y, None if cache is None or S is None else DeltaNetState(cache, S)

    def layers(self) -> list[nn.Linear]:
        """What is applied to x; the results of those after the first two go to `decay` and `readout`."""
        return [self.qkv, self.beta]

    def decay(self, projected: list[Tensor]) -> Tensor | None:
        """The log decay of each step and head (B, T, H), or None."""
        return None

    def readout(self, o: Tensor, projected: list[Tensor], pick: Pick) -> Tensor:
        """What was read from the state, o (B, Q, H, V), made ready for the output projection."""
        return gated_norm(o, None, self.norm_weight)
