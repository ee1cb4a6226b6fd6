"""Linear attention: softmax's exp(q.k) replaced by phi(q).phi(k), which turns the cache into a sum of fixed size."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field
from torch import Tensor, nn

from zoo.kernels.backend import state_dtype
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.kernels.projections import projections
from zoo.mixers.base import LayerInfo, head_dim
from zoo.mixers.feature_maps import FEATURE_MAPS, FeatureMapName
from zoo.mixers.recurrent import RecurrentMixer


class LinearAttentionState(NamedTuple):
    """S (B, H, F, V): sum of phi(k_t) v_t^T. z (B, H, F): sum of phi(k_t). Both fp32 (fp64 for fp64)."""

    S: Tensor
    z: Tensor


class LinearAttention(RecurrentMixer):
    """y_t = W_o [S_t^T phi(q_t) / (phi(q_t).z_t + eps)] per head (arXiv 2006.16236, eq. 18 to 20).

        S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t)

    q, k and v are linear in x_t, without biases, and positions are not rotated. Weights start as N(0, 0.02^2), as in
    the published MQAR runs.
    """

    class Config(RecurrentMixer.Config):
        num_heads: int = Field(1, ge=1, description="Heads; each has d_model / num_heads value channels.")
        feature_map: FeatureMapName = Field("elu", description="phi: elu (ELU + 1), relu, hedgehog (learned), taylor.")
        feature_dim: int | None = Field(
            None, ge=1, description="K, channels of a head's query and key before phi; None: d_model / num_heads."
        )
        eps: float = Field(1e-6, gt=0, description="Added to the normaliser.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        self.value_dim = head_dim(layer.d_model, config.num_heads)
        self.key_dim = config.feature_dim or self.value_dim
        self.map_q, self.map_k = (FEATURE_MAPS[config.feature_map](config.num_heads, self.key_dim) for _ in range(2))
        self.qkv = nn.Linear(layer.d_model, 2 * config.num_heads * self.key_dim + layer.d_model, bias=False)
        self.out = nn.Linear(layer.d_model, layer.d_model, bias=False)
        nn.init.normal_(self.qkv.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02)

    def init_state(self, batch_size: int) -> LinearAttentionState:
        weight = self.out.weight
        z = weight.new_zeros(
            batch_size, self.config.num_heads, self.map_k.num_features, dtype=state_dtype(weight.dtype)
        )
        return LinearAttentionState(z[..., None].repeat(1, 1, 1, self.value_dim), z)

    def mix(
        self, x: Tensor, state: LinearAttentionState | None, return_state: bool
    ) -> tuple[Tensor, LinearAttentionState | None]:
        H = self.config.num_heads
        keys = H * self.key_dim
        weights = self.qkv.weight.split([keys, keys, self.layer.d_model])
        q, k, v = (y.unflatten(-1, (H, -1)) for y in projections(x, *weights))
        q, k = self.map_q(q), self.map_k(k)
        S, z_0 = (None, None) if state is None else state
        o, S = linear_recurrence(q, k, v, initial_state=S, return_state=return_state)
        # The sums of up to T features stay in fp32, whatever q and k are.
        dtype = state_dtype(x.dtype)
        z = k.cumsum(1, dtype=dtype) if z_0 is None else k.cumsum(1, dtype=dtype) + z_0[:, None]
        weight = (q.to(dtype) * z).sum(-1, keepdim=True)
        y = self.out((o / (weight + self.config.eps)).to(x.dtype).flatten(2))
        return y, None if S is None else LinearAttentionState(S, z[:, -1])
