"""RWKV-6 (Finch): linear attention whose decay, channel by channel, and token shift depend on the data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ConfigError
from zoo.kernels.activation import activation
from zoo.kernels.backend import state_dtype
from zoo.kernels.gated_norm import gated_norm
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.kernels.token_shift import token_shift
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import RecurrentMixer


class RWKV6State(NamedTuple):
    """previous (B, D): the last input. S (B, H, K, K): the matrix-valued state, fp32 (fp64 for fp64)."""

    previous: Tensor
    S: Tensor


class RWKV6(RecurrentMixer):
    """Time mixing of RWKV-6, arXiv 2404.05892, eq. 11 to 19; no channel mixing.

        x^i_t = x_t + (x_{t-1} - x_t) (m_i + tanh((x_t + (x_{t-1} - x_t) m_x) A_i) B_i)     for i in w, k, v, r, g
        log decay_t = -exp(w + tanh(x^w_t A_w) B_w);   r, k, v, g linear in their x^i
        S_t = diag(decay_t) S_{t-1} + k_t v_t^T;   o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t       per head
        y_t = W_o (norm(o_t) * silu(g_t)),   norm over each head

    Initialised as in the official code: m, w, u and the norm's scale by channel and depth, orthogonal projections
    (k and g a tenth), every A and W_o as 0; and like there no weight decay but on the projections.
    """

    class Config(RecurrentMixer.Config):
        head_dim: int = Field(64, ge=1, description="K, channels of a head: the state is d_model x K, and the shift.")
        mix_rank: int = Field(32, ge=1, description="Rank of each A_i B_i of the token shift.")
        decay_rank: int = Field(64, ge=1, description="Rank of A_w B_w of the decay.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D = layer.d_model
        if D % config.head_dim:
            allowed = [k for k in range(1, D + 1) if D % k == 0]
            raise ConfigError(
                f"rwkv6: d_model {D} is not divisible by head_dim {config.head_dim}; use one of {allowed}."
            )
        self.num_heads = D // config.head_dim
        depth = layer.index / max(1, layer.depth - 1)  # 0 in the first layer, 1 in the last
        to_go = 1 - layer.index / layer.depth  # 1 in the first layer, almost 0 in the last
        channel = torch.arange(D) / D
        along = torch.arange(D) / max(1, D - 1)

        rising, slower = channel**to_go, channel ** (0.5 * to_go)
        self.shift = nn.Parameter(1 - rising)
        self.shifts = nn.Parameter(1 - torch.stack([rising, rising, rising + 0.3 * depth, slower, slower]))
        self.shift_down = nn.Parameter(torch.zeros(D, 5 * config.mix_rank))
        self.shift_up = nn.Parameter(torch.empty(5, config.mix_rank, D).uniform_(-0.01, 0.01))
        self.decay = nn.Parameter(-6 + 5 * along ** (0.7 + 1.3 * depth))
        self.decay_down = nn.Parameter(torch.zeros(D, config.decay_rank))
        self.decay_up = nn.Parameter(torch.empty(config.decay_rank, D).uniform_(-0.01, 0.01))
        zigzag = ((torch.arange(D) + 1) % 3 - 1) * 0.1
        self.bonus = nn.Parameter((depth * (1 - along) + zigzag).view(self.num_heads, -1))
        for parameter in self.parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

        self.receptance, self.key, self.value, self.gate, self.output = (nn.Linear(D, D, bias=False) for _ in range(5))
        for linear, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0), (self.gate, 0.1)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        nn.init.zeros_(self.output.weight)
        # 1e-5 times the square of the official code's head_size_divisor, 8.
        self.norm = nn.GroupNorm(self.num_heads, D, eps=64e-5)
        nn.init.constant_(self.norm.weight, ((1 + layer.index) / layer.depth) ** 0.7)

    def init_state(self, batch_size: int) -> RWKV6State:
        weight, K = self.output.weight, self.config.head_dim
        return RWKV6State(
            weight.new_zeros(batch_size, self.layer.d_model),
            weight.new_zeros(batch_size, self.num_heads, K, K, dtype=state_dtype(weight.dtype)),
        )

    def mix(self, x: Tensor, state: RWKV6State | None, return_state: bool) -> tuple[Tensor, RWKV6State | None]:
        previous, S = (None, None) if state is None else state
        (mixed,) = token_shift(x, self.shift[None], previous=previous)
        low = torch.tanh(F.linear(mixed, self.shift_down.T)).unflatten(-1, (5, -1))
        offset = torch.einsum("btir,ird->ibtd", low, self.shift_up)
        w, k, v, r, g = token_shift(x, self.shifts, offset, previous=previous)
        decay = activation(
            F.linear(torch.tanh(F.linear(w, self.decay_down.T)), self.decay_up.T), self.decay, "exp", scale=-1
        )
        r, k, v, decay = (
            y.unflatten(-1, (self.num_heads, -1)) for y in (self.receptance(r), self.key(k), self.value(v), decay)
        )
        o, S = linear_recurrence(
            r,
            k,
            v,
            decay,
            bonus=self.bonus,
            initial_state=S,
            return_state=return_state,
        )
        scale, shift = (p.view(self.num_heads, -1) for p in (self.norm.weight, self.norm.bias))
        o = gated_norm(o, self.gate(g).view_as(o), scale, shift, kind="layer", eps=self.norm.eps)
        return self.output(o.flatten(2)), None if S is None else RWKV6State(x[:, -1], S)
