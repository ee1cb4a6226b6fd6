"""RWKV-6 (Finch): linear attention with a data-dependent decay per channel and a data-dependent token shift."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ConfigError
from zoo.kernels.backend import state_dtype
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.mixers.base import LayerInfo, Mixer

_MIXED = ("w", "k", "v", "r", "g")


class RWKV6State(NamedTuple):
    """previous (B, D): the last input. memory (B, H, K, K): the matrix-valued state, fp32."""

    previous: Tensor
    memory: Tensor


class RWKV6(Mixer):
    """Time mixing of RWKV-6, arXiv 2404.05892, eq. 11 to 19.

        x^i_t = x_t + (x_{t-1} - x_t) * (mu_i + A-B LoRA_i(x_t + (x_{t-1} - x_t) * mu_x))     i in w, k, v, r, g
        log w_t = -exp(omega + LoRA_w(x^w_t))
        S_t = diag(w_t) S_{t-1} + k_t v_t^T,   o_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
        y_t = W_o (GroupNorm(o_t) * silu(W_g x^g_t))

    Initialised as in the official code (RWKV-LM, RWKV-v6): mixing weights, decays and bonus by channel and depth,
    orthogonal projections, LoRAs and output that start at 0.
    """

    class Config(Mixer.Config):
        """head_dim: channels of a head, so the state holds d_model * head_dim numbers. *_rank: of the LoRAs."""

        head_dim: int = Field(default=64, gt=0)
        mix_rank: int = Field(default=32, gt=0)
        decay_rank: int = Field(default=64, gt=0)

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D = layer.d_model
        if D % config.head_dim:
            allowed = [k for k in range(1, D + 1) if D % k == 0]
            raise ConfigError(f"d_model {D} is not divisible by head_dim {config.head_dim}; use one of {allowed}.")
        self.num_heads = D // config.head_dim
        depth = layer.index / max(1, layer.depth - 1)  # 0 in the first layer, 1 in the last
        left = 1 - layer.index / layer.depth  # 1 in the first layer, almost 0 in the last
        channel = torch.arange(D) / D

        self.shift = nn.Parameter(1 - channel**left)
        self.shift_by = nn.Parameter(
            torch.stack(
                [
                    1 - channel**left,
                    1 - channel**left,
                    1 - (channel**left + 0.3 * depth),
                    1 - channel ** (0.5 * left),
                    1 - channel ** (0.5 * left),
                ]
            )
        )
        self.shift_down = nn.Parameter(torch.zeros(D, len(_MIXED) * config.mix_rank))
        self.shift_up = nn.Parameter(torch.empty(len(_MIXED), config.mix_rank, D).uniform_(-0.01, 0.01))

        along = torch.arange(D) / max(1, D - 1)
        self.decay = nn.Parameter(-6 + 5 * along ** (0.7 + 1.3 * depth))
        self.decay_down = nn.Parameter(torch.zeros(D, config.decay_rank))
        self.decay_up = nn.Parameter(torch.empty(config.decay_rank, D).uniform_(-0.01, 0.01))
        zigzag = ((torch.arange(D) + 1) % 3 - 1) * 0.1
        self.bonus = nn.Parameter(depth * (1 - along) + zigzag)

        self.receptance, self.key, self.value, self.gate, self.output = (nn.Linear(D, D, bias=False) for _ in range(5))
        for linear, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0), (self.gate, 0.1)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        nn.init.zeros_(self.output.weight)
        # The official code's head_size_divisor of 8, squared.
        self.norm = nn.GroupNorm(self.num_heads, D, eps=64e-5)
        for parameter in (self.shift, self.shift_by, self.decay, self.bonus):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self._mix(x, F.pad(x[:, :-1], (0, 0, 1, 0)), None, return_state=False)[0]

    def prefill(self, x: Tensor, state: RWKV6State | None = None) -> tuple[Tensor, RWKV6State]:
        state = self.init_state(x.shape[0]) if state is None else state
        before = torch.cat([state.previous[:, None], x[:, :-1]], dim=1)
        y, memory = self._mix(x, before, state.memory, return_state=True)
        assert memory is not None
        return y, RWKV6State(x[:, -1], memory)

    def init_state(self, batch_size: int) -> RWKV6State:
        weight, K = self.output.weight, self.config.head_dim
        return RWKV6State(
            weight.new_zeros(batch_size, self.layer.d_model),
            weight.new_zeros(batch_size, self.num_heads, K, K, dtype=state_dtype(weight.dtype)),
        )

    def step(self, x_t: Tensor, state: RWKV6State) -> tuple[Tensor, RWKV6State]:
        y, memory = self._mix(x_t[:, None], state.previous[:, None], state.memory, return_state=True)
        assert memory is not None
        return y[:, 0], RWKV6State(x_t, memory)

    def _mix(
        self, x: Tensor, before: Tensor, memory: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        B, T, D = x.shape
        H, K = self.num_heads, self.config.head_dim
        change = before - x
        low = torch.tanh((x + change * self.shift) @ self.shift_down).view(B * T, len(_MIXED), -1).transpose(0, 1)
        shift = self.shift_by[:, None] + torch.bmm(low, self.shift_up)
        w, k, v, r, g = (x + change * by.view(B, T, D) for by in shift)
        log_decay = self.decay + torch.tanh(w @ self.decay_down) @ self.decay_up
        log_decay = -torch.exp(log_decay.to(state_dtype(x.dtype)))
        o, memory = linear_recurrence(
            self.receptance(r).view(B, T, H, K),
            self.key(k).view(B, T, H, K),
            self.value(v).view(B, T, H, K),
            log_decay.view(B, T, H, K),
            bonus=self.bonus.view(H, K),
            initial_state=memory,
            return_state=return_state,
        )
        normed = self.norm(o.reshape(B * T, D)).view(B, T, D)
        return self.output(normed * F.silu(self.gate(g))), memory
