"""BASED's linear attention: the second-order Taylor polynomial of softmax, its recall set by the feature dimension."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from zoo.kernels.backend import state_dtype
from zoo.kernels.taylor_attention import TaylorState, taylor_attention
from zoo.kernels.taylor_attention.features import num_features
from zoo.mixers.base import LayerInfo, head_dim
from zoo.mixers.recurrent import RecurrentMixer


class Based(RecurrentMixer):
    """y_t = W_o [sum_{s <= t} w_ts v_s / (sum_{s <= t} w_ts + eps)] per head (arXiv 2402.18668, section 4.1 and eq. 4).

    w_ts = 1 + a_ts + a_ts^2 / 2, a_ts = q_t.k_s / sqrt(K). As a recurrence its state holds F = 1 + K + K(K+1)/2
    features by (V + 1) numbers for each head: K is the dial. The whole architecture alternates it with
    `sliding_window` and `gated_conv` layers. q, k and v are linear in x_t, without biases, and positions are not
    rotated. Weights start as N(0, 0.02^2), as in the published MQAR runs.
    """

    class Config(RecurrentMixer.Config):
        feature_dim: int = Field(16, ge=1, description="K, channels of a head's query and key: the dial of the state.")
        num_heads: int = Field(1, ge=1, description="Heads; each has d_model / num_heads value channels.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        self.value_dim = head_dim(layer.d_model, config.num_heads)
        self.qkv = nn.Linear(layer.d_model, 2 * config.num_heads * config.feature_dim + layer.d_model, bias=False)
        self.out = nn.Linear(layer.d_model, layer.d_model, bias=False)
        nn.init.normal_(self.qkv.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02)

    def init_state(self, batch_size: int) -> TaylorState:
        weight = self.out.weight
        z = weight.new_zeros(
            batch_size, self.config.num_heads, num_features(self.config.feature_dim), dtype=state_dtype(weight.dtype)
        )
        return TaylorState(z[..., None].repeat(1, 1, 1, self.value_dim), z)

    def mix(self, x: Tensor, state: TaylorState | None, return_state: bool) -> tuple[Tensor, TaylorState | None]:
        H = self.config.num_heads
        keys = H * self.config.feature_dim
        q, k, v = (y.unflatten(-1, (H, -1)) for y in self.qkv(x).split([keys, keys, self.layer.d_model], dim=-1))
        o, state = taylor_attention(q, k, v, initial_state=state, return_state=return_state)
        return self.out(o.flatten(2)), state
