"""RWKV-4: an average of values by keys that fade, each channel by itself, behind a token shift and a gate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels.token_shift import token_shift
from zoo.kernels.wkv import WKVState, empty_state, wkv
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import Pick, ReadoutMixer, everywhere


class RWKV4State(NamedTuple):
    """previous (B, D): the last input. wkv: three of (B, D), fp32 (fp64 for fp64)."""

    previous: Tensor
    wkv: WKVState


class RWKV4(ReadoutMixer):
    """Time mixing of RWKV-4, arXiv 2305.13048, eq. 11 to 13, 16 and 17; no channel mixing.

        r_t = W_r (m_r x_t + (1 - m_r) x_{t-1}),   k and v likewise
        wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t})
        y_t = W_o (sigmoid(r_t) * wkv_t)

    w is the exponential of its parameter. Initialised as in the official code: m, w and u by channel and depth, W_v
    orthogonal, W_r, W_k and W_o as 0; no weight decay on m, as on all vectors. The state has no dial but d_model.
    """

    def __init__(self, config: ReadoutMixer.Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D = layer.d_model
        depth = layer.index / max(1, layer.depth - 1)  # 0 in the first layer, 1 in the last
        to_go = 1 - layer.index / layer.depth  # 1 in the first layer, almost 0 in the last
        channel = torch.arange(D) / D
        along = torch.arange(D) / max(1, D - 1)

        rising = channel**to_go
        # 1 - m: the share of the token before, of r, k and v.
        self.shifts = nn.Parameter(1 - torch.stack([channel ** (0.5 * to_go), rising, rising + 0.3 * depth]))
        self.shifts._no_weight_decay = True  # type: ignore[attr-defined]
        self.decay = nn.Parameter(-5 + 8 * along ** (0.7 + 1.3 * depth))
        zigzag = ((torch.arange(D) + 1) % 3 - 1) * 0.5
        self.bonus = nn.Parameter(math.log(0.3) + zigzag)
        self.receptance, self.key, self.value, self.output = (nn.Linear(D, D, bias=False) for _ in range(4))
        nn.init.orthogonal_(self.value.weight)
        for linear in (self.receptance, self.key, self.output):
            nn.init.zeros_(linear.weight)

    def init_state(self, batch_size: int) -> RWKV4State:
        weight = self.output.weight
        return RWKV4State(weight.new_zeros(batch_size, self.layer.d_model), empty_state(weight, batch_size))

    def mix(
        self, x: Tensor, state: RWKV4State | None, return_state: bool, pick: Pick = everywhere
    ) -> tuple[Tensor, RWKV4State | None]:
        previous, average = (None, None) if state is None else state
        r, k, v = token_shift(x, self.shifts, previous=previous)
        decay = -torch.exp(self.decay)
        o, average = wkv(
            self.key(k), self.value(v), decay, self.bonus, initial_state=average, return_state=return_state
        )
        y = self.output(torch.sigmoid(self.receptance(pick(r))) * pick(o))
        return y, None if average is None else RWKV4State(x[:, -1], average)
