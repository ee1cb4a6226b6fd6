"""H3: a shift and a diagonal state space model with products between them, after the pattern of linear attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ConfigError
from zoo.kernels.long_conv import long_conv
from zoo.kernels.outer_conv import outer_conv
from zoo.kernels.projections import projections
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import Pick, ReadoutMixer, everywhere
from zoo.mixers.s4d import DiagonalSSM


class H3State(NamedTuple):
    """shift (B, N-1, D): the last keys. diagonal (B, K K, D / K, N / 2, 2): the SSM's, real and imaginary parts."""

    shift: Tensor
    diagonal: Tensor


class H3(ReadoutMixer):
    """y = W_o (q * SSM_diag(SSM_shift(k) v^T)), an outer product in each head of K channels (arXiv 2212.14052, alg. 1).

    The shift SSM keeps the last N inputs (its B is e_1), so that with its output matrix it is a filter of N learned
    taps; the diagonal one is S4D-Lin (zoo.mixers.s4d). Both add their input times a learned D. Initialised as in the
    official code: taps uniform in +-N^-1/2, both D normal, torch's defaults for the projections.
    """

    class Config(ReadoutMixer.Config):
        d_state: int = Field(64, ge=2, multiple_of=2, description="N, states per channel of both state space models.")
        head_dim: int = Field(1, ge=1, description="K, channels of a head; the diagonal SSM runs D x K systems.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D, N = layer.d_model, config.d_state
        if D % config.head_dim:
            allowed = [k for k in range(1, D + 1) if D % k == 0]
            raise ConfigError(f"h3: d_model {D} is not divisible by head_dim {config.head_dim}; use one of {allowed}.")
        self.qkv = nn.Linear(D, 3 * D)
        self.shift = nn.Parameter(torch.empty(D, N).uniform_(-(N**-0.5), N**-0.5))
        self.shift_D = nn.Parameter(torch.randn(D))
        self.diagonal = DiagonalSSM(D // config.head_dim, N)
        self.out_proj = nn.Linear(D, D)

    def init_state(self, batch_size: int) -> H3State:
        return H3State(
            self.shift.new_zeros(batch_size, self.config.d_state - 1, self.layer.d_model),
            self.diagonal.init_state(batch_size, self.config.head_dim**2),
        )

    def mix(
        self, x: Tensor, state: H3State | None, return_state: bool, pick: Pick = everywhere
    ) -> tuple[Tensor, H3State | None]:
        K = self.config.head_dim
        past, diagonal = (None, None) if state is None else state
        q, k, v = projections(x, *self.qkv.weight.chunk(3), biases=self.qkv.bias.chunk(3))
        # The heads stand behind their channels, being many where a head has few of them.
        shifted = long_conv(k, self.shift, self.shift_D, past=past, time_last=True).unflatten(1, (K, -1))
        q, v = (y.unflatten(-1, (K, -1)) for y in (q, v))
        if diagonal is None and not return_state:
            y = outer_conv(q, shifted, v, self.diagonal.kernel(x.shape[1]), self.diagonal.D)
            return self.out_proj(pick(y.flatten(2))), None
        kv_BTKKH = shifted.permute(0, 3, 1, 2)[:, :, :, None] * v[:, :, None]
        y, diagonal = self.diagonal(kv_BTKKH.flatten(2, 3), diagonal, return_state)
        y = self.out_proj(pick((q[:, :, :, None] * y.view_as(kv_BTKKH)).sum(2).flatten(2)))
        if not return_state:
            return y, None
        kept = self.config.d_state - 1
        keys = F.pad(k, (0, 0, kept, 0)) if past is None else torch.cat([past, k], dim=1)
        return y, H3State(keys[:, -kept:].clone(), diagonal)
