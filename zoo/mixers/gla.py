"""Gated linear attention: each channel of the state forgets at a rate that the data sets."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.activation import activation
from zoo.kernels.backend import state_dtype
from zoo.kernels.gated_norm import gated_norm
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.kernels.projections import projections
from zoo.mixers.base import LayerInfo, head_dim
from zoo.mixers.recurrent import Pick, ReadoutMixer, everywhere


class GLA(ReadoutMixer):
    """y_t = W_o [RMSNorm(S_t^T q_t) w * silu(W_g x_t)], per head (arXiv 2312.06635, eq. 3 and section 4.4).

        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,   alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16)

    q is scaled by 1/sqrt(K). Initialised as in the authors' library: Xavier uniform with gain 2^-2.5, b = 0, w = 1.
    The state is S (B, H, K, V).
    """

    class Config(ReadoutMixer.Config):
        num_heads: int = Field(4, ge=1, description="Heads, each with d_model / num_heads value channels.")
        expand_k: float = Field(0.5, gt=0, description="Key channels per value channel; the paper has a half.")
        gate_rank: int = Field(16, ge=1, description="Rank of W_2 W_1, which makes the decays.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D, keys = layer.d_model, round(config.expand_k * layer.d_model)
        self.value_dim = head_dim(D, config.num_heads)
        self.key_dim = head_dim(keys, config.num_heads, f"expand_k {config.expand_k} x d_model {D} =")
        self.q, self.k = nn.Linear(D, keys, bias=False), nn.Linear(D, keys, bias=False)
        self.v, self.gate, self.out = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.decay_down, self.decay_up = nn.Linear(D, config.gate_rank, bias=False), nn.Linear(config.gate_rank, keys)
        self.norm_weight = nn.Parameter(torch.ones(self.value_dim))
        for linear in (self.q, self.k, self.v, self.gate, self.out, self.decay_down, self.decay_up):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.zeros_(self.decay_up.bias)

    def init_state(self, batch_size: int) -> Tensor:
        weight = self.out.weight
        shape = (batch_size, self.config.num_heads, self.key_dim, self.value_dim)
        return weight.new_zeros(shape, dtype=state_dtype(weight.dtype))

    def mix(
        self, x: Tensor, state: Tensor | None, return_state: bool, pick: Pick = everywhere
    ) -> tuple[Tensor, Tensor | None]:
        H = self.config.num_heads
        layers = (self.q, self.k, self.v, self.gate, self.decay_down)
        q, k, v, gate, low = projections(x, *(layer.weight for layer in layers))
        g = activation(F.linear(low, self.decay_up.weight), self.decay_up.bias, "logsigmoid", scale=1 / 16)
        q, k, v, gate, g = (y.unflatten(-1, (H, -1)) for y in (q, k, v, gate, g))
        o, state = linear_recurrence(q, k, v, g, initial_state=state, return_state=return_state)
        # The norm undoes a scale of q, but for its eps.
        o = gated_norm(pick(o), pick(gate), self.norm_weight, eps=1e-5 * self.key_dim)
        return self.out(o.flatten(2)), state
