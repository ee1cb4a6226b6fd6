"""RWKV-7 (Goose): a state that decays channel by channel and is corrected by a generalised delta rule."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ConfigError
from zoo.kernels.activation import activation
from zoo.kernels.backend import state_dtype
from zoo.kernels.delta_rule import generalized_delta_rule
from zoo.kernels.rwkv7 import rwkv7_keys, rwkv7_readout
from zoo.kernels.shifted_projections import shifted_projections
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import Pick, ReadoutMixer, beside, everywhere

# The decay of a step is at least exp(-exp(-0.5)) = 0.545 (arXiv 2503.14456, eq. 11).
MIN_DECAY = -math.exp(-0.5)


class RWKV7State(NamedTuple):
    """previous (B, D): the last input. S (B, H, K, K): the matrix-valued state, fp32 (fp64 for fp64)."""

    previous: Tensor
    S: Tensor


class RWKV7(ReadoutMixer):
    """Time mixing of RWKV-7, arXiv 2503.14456, eq. 3 to 22; no channel mixing.

        x^i_t = x_t + (x_{t-1} - x_t) m_i                                     for i in r, w, k, v, a, g
        r, k, v linear in their x^i;   log w_t = -e^{-1/2} sigmoid(w + tanh(x^w_t A_w) B_w)
        a_t = sigmoid(a + x^a_t A_a B_a);   g_t = sigmoid(x^g_t A_g) B_g
        kappa_t = (k_t * c_k) / |k_t * c_k|;   k'_t = k_t * (1 + (a_t - 1) * c_a)
        S_t = (diag(w_t) - (kappa_t * a_t) kappa_t^T) S_{t-1} + k'_t v_t^T      per head
        y_t = W_o (g_t * (norm(S_t^T r_t) + (r_t . (c_r * k'_t)) v_t)),         norm over each head

    The paper's value residual is left out: it mixes v with the first layer's, and a mixer sees its own layer only.

    Initialised as in the official code: m, w, a, c and the norm's scale by channel and depth, r, k and v uniform within
    0.5, 0.05 and 0.5 of 1/sqrt(D), every A and W_o as 0, every B orthogonal times 0.1; and like there no weight decay
    but on the matrices r, k, v and W_o.
    """

    class Config(ReadoutMixer.Config):
        head_dim: int = Field(64, ge=1, description="K, channels of a head: the state is d_model x K, and the shift.")
        decay_rank: int | None = Field(None, ge=1, description="Rank of A_w B_w; None: 2.5 sqrt(d_model), by 32.")
        rate_rank: int | None = Field(None, ge=1, description="Rank of A_a B_a; None: 2.5 sqrt(d_model), by 32.")
        gate_rank: int | None = Field(None, ge=1, description="Rank of A_g B_g; None: 5 sqrt(d_model), by 32.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D, K = layer.d_model, config.head_dim
        if D % K:
            allowed = [k for k in range(1, D + 1) if D % k == 0]
            raise ConfigError(f"rwkv7: d_model {D} is not divisible by head_dim {K}; use one of {allowed}.")
        self.num_heads = D // K
        depth = layer.index / max(1, layer.depth - 1)  # 0 in the first layer, 1 in the last
        to_go = 1 - layer.index / layer.depth  # 1 in the first layer, almost 0 in the last
        channel = torch.arange(D) / D
        along = torch.arange(D) / max(1, D - 1)
        centred = along - 0.5
        zigzag = (2 * (torch.arange(D) % K) - (K - 1)) / max(1, K - 1)  # from -1 to 1 in each head
        zigzag = zigzag * zigzag.abs()

        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])
        self.shifts = nn.Parameter(1 - channel ** (to_go * powers[:, None]))
        self.decay = nn.Parameter(-5.5 + 6 * along ** (1 + depth**0.3) + 2.5 * zigzag)
        self.decay_down, self.decay_up = low_rank(D, config.decay_rank or suggested_rank(2.5, D))
        self.rate = nn.Parameter(-0.19 + 0.3 * zigzag + 0.4 * centred)
        self.rate_down, self.rate_up = low_rank(D, config.rate_rank or suggested_rank(2.5, D))
        self.gate_down, self.gate_up = low_rank(D, config.gate_rank or suggested_rank(5, D))
        self.removal = nn.Parameter(0.71 - 0.1 * centred)
        self.replacement = nn.Parameter(torch.full((D,), 1.02))
        self.bonus = nn.Parameter(torch.full((self.num_heads, K), -0.04))
        for parameter in self.parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

        self.receptance, self.key, self.value, self.output = (nn.Linear(D, D, bias=False) for _ in range(4))
        for linear, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            nn.init.uniform_(linear.weight, -bound * D**-0.5, bound * D**-0.5)
        nn.init.zeros_(self.output.weight)
        self.norm = nn.GroupNorm(self.num_heads, D, eps=64e-5)
        nn.init.constant_(self.norm.weight, ((1 + layer.index) / layer.depth) ** 0.7)

    def init_state(self, batch_size: int) -> RWKV7State:
        weight, K = self.output.weight, self.config.head_dim
        return RWKV7State(
            weight.new_zeros(batch_size, self.layer.d_model),
            weight.new_zeros(batch_size, self.num_heads, K, K, dtype=state_dtype(weight.dtype)),
        )

    def mix(
        self, x: Tensor, state: RWKV7State | None, return_state: bool, pick: Pick = everywhere
    ) -> tuple[Tensor, RWKV7State | None]:
        previous, S = (None, None) if state is None else state
        r, w, k, v, a, g = shifted_projections(
            x,
            self.shifts,
            self.receptance.weight,
            self.decay_down.T,
            self.key.weight,
            self.value.weight,
            self.rate_down.T,
            self.gate_down.T,
            previous=previous,
        )
        decay = activation(F.linear(torch.tanh(w), self.decay_up.T), self.decay, "sigmoid", scale=MIN_DECAY)
        rate = F.linear(a, self.rate_up.T)
        gate = F.linear(torch.sigmoid(pick(g)), self.gate_up.T)
        r, k, v, decay, rate, gate = (y.unflatten(-1, (self.num_heads, -1)) for y in (r, k, v, decay, rate, gate))
        rate_bias, removal, replacement, scale, shift = (
            p.view(self.num_heads, -1)
            for p in (self.rate, self.removal, self.replacement, self.norm.weight, self.norm.bias)
        )
        k, a, b = rwkv7_keys(k, rate, rate_bias, removal, replacement)
        (r, k, v), (q_r, q_k, q_v) = beside(pick, r, k, v)
        o, S = generalized_delta_rule(
            r, k, v, a, b, decay, min_decay=MIN_DECAY, initial_state=S, return_state=return_state
        )
        y = rwkv7_readout(pick(o), q_r, q_k, q_v, gate, scale, shift, self.bonus, eps=self.norm.eps)
        return self.output(y.flatten(2)), None if S is None else RWKV7State(x[:, -1], S)


def low_rank(D: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (D, rank) of zeros and B (rank, D), orthogonal and a tenth long."""
    up = nn.Parameter(torch.empty(rank, D))
    nn.init.orthogonal_(up, gain=0.1 * max(1, rank / D) ** 0.5)
    return nn.Parameter(torch.zeros(D, rank)), up


def suggested_rank(factor: float, D: int) -> int:
    """factor * sqrt(D) to the nearest 32, at least 32: the official code's suggestion."""
    return max(32, 32 * round(factor * D**0.5 / 32))
