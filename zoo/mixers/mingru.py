"""minGRU: a gated recurrent unit whose gate and candidate see the present token only, and so a scan."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field
from torch import Tensor, nn

from zoo.kernels.backend import state_dtype
from zoo.kernels.mingru import mingru_inputs
from zoo.kernels.selective_scan import selective_scan
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import RecurrentMixer


class MinGRUState(NamedTuple):
    """h (B, E, 1), fp32 (fp64 for fp64)."""

    h: Tensor


class MinGRU(RecurrentMixer):
    """h_t = (1 - z_t) h_{t-1} + z_t c_t, z = sigmoid(W_z x), c = W_c x, y = W_o h (arXiv 2410.01201, section 3.1).

    E = expand * d_model channels. As a selective scan: 1 - z = exp(-dt) with dt = softplus(W_z x), A = -1, one state a
    channel. Initialised by torch's defaults.
    """

    class Config(RecurrentMixer.Config):
        expand: int = Field(1, ge=1, description="Channels of the state per channel of the model: the dial.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        self.in_proj = nn.Linear(layer.d_model, 2 * config.expand * layer.d_model)
        self.out_proj = nn.Linear(config.expand * layer.d_model, layer.d_model)

    def init_state(self, batch_size: int) -> MinGRUState:
        weight = self.out_proj.weight
        return MinGRUState(weight.new_zeros(batch_size, weight.shape[1], 1, dtype=state_dtype(weight.dtype)))

    def mix(self, x: Tensor, state: MinGRUState | None, return_state: bool) -> tuple[Tensor, MinGRUState | None]:
        gate, candidate = self.in_proj(x).chunk(2, dim=-1)
        # The scan multiplies its input by dt.
        x, dt = mingru_inputs(candidate, gate)
        one = dt.new_ones(dt.shape[-1], 1)
        y, h = selective_scan(
            x,
            dt,
            -one,
            one,
            one,
            initial_state=None if state is None else state.h,
            return_state=return_state,
        )
        return self.out_proj(y), None if h is None else MinGRUState(h)
