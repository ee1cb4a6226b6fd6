"""RetNet: linear attention whose heads forget at fixed rates."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.kernels.backend import state_dtype
from zoo.kernels.gated_norm import gated_norm
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.kernels.projections import projections
from zoo.mixers.base import LayerInfo, head_dim
from zoo.mixers.recurrent import RecurrentMixer


class RetNet(RecurrentMixer):
    """y_t = W_o [RMSNorm(S_t^T q_t / sqrt(K)) * silu(W_g x_t)], per head h (arXiv 2307.08621, eq. 6 to 8).

        S_t = gamma_h S_{t-1} + k_t v_t^T,   gamma_h = 1 - 2^(-5-h)

    Without the rotation of q and k, which needs a count of the tokens beside S. Initialised as in the official code:
    Xavier uniform with gain 2^-2.5, the output with gain 1/2. The norm has no weights. The state is S (B, H, K, V).
    """

    class Config(RecurrentMixer.Config):
        num_heads: int = Field(
            4, ge=1, description="Heads, each with d_model / num_heads key channels and its own rate."
        )
        expand_v: int = Field(2, ge=1, description="Value channels per key channel; the paper has 2.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D, values = layer.d_model, config.expand_v * layer.d_model
        self.key_dim = head_dim(D, config.num_heads)
        self.value_dim = config.expand_v * self.key_dim
        self.q, self.k = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.v, self.gate = nn.Linear(D, values, bias=False), nn.Linear(D, values, bias=False)
        self.out = nn.Linear(values, D, bias=False)
        for linear in (self.q, self.k, self.v, self.gate):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out.weight, gain=0.5)

    def init_state(self, batch_size: int) -> Tensor:
        weight = self.out.weight
        shape = (batch_size, self.config.num_heads, self.key_dim, self.value_dim)
        return weight.new_zeros(shape, dtype=state_dtype(weight.dtype))

    def mix(self, x: Tensor, state: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor | None]:
        H = self.config.num_heads
        projected = projections(x, *(layer.weight for layer in (self.q, self.k, self.v, self.gate)))
        q, k, v, gate = (y.unflatten(-1, (H, -1)) for y in projected)
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(H, dtype=state_dtype(x.dtype), device=x.device))))
        o, state = linear_recurrence(q, k, v, decay, initial_state=state, return_state=return_state)
        # The norm undoes a scale of q, but for its eps.
        o = gated_norm(o, gate, eps=1e-6 * self.key_dim)
        return self.out(o.flatten(2)), state
