"""Feature maps phi of linear attention: q and k (B, T, H, K) -> non-negative weights phi(q).phi(k), F features each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.taylor_attention.features import num_features, taylor_features

FeatureMapName = Literal["elu", "relu", "hedgehog", "taylor"]


class FeatureMap(nn.Module):
    """phi (B, T, H, K) -> (B, T, H, F); `num_features` is F."""

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ELU(FeatureMap):
    """phi(x) = elu(x) + 1, F = K. arXiv 2006.16236, eq. 7."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


class ReLU(FeatureMap):
    """phi(x) = relu(x), F = K. arXiv 2103.13076 without its learned projection."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Hedgehog(FeatureMap):
    """phi(x) = softmax([2 z, -2 z]), z = W_h x + b_h for head h, F = 2 K. arXiv 2402.04347, section 4.

    W starts as the identity and b as 0, as in the paper's code.
    """

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__(num_heads, dim)
        self.num_features = 2 * dim
        self.weight = nn.Parameter(torch.eye(dim).repeat(num_heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, dim))
        self.bias._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        z = 2 * (torch.einsum("bthk,hjk->bthj", x, self.weight) + self.bias)
        return torch.cat([z, -z], dim=-1).softmax(dim=-1)


class Taylor(FeatureMap):
    """phi(q).phi(k) = 1 + s + s^2/2, s = q.k / sqrt(K); F = 1 + K + K(K+1)/2. arXiv 2402.18668, section 4.1."""

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__(num_heads, dim)
        self.num_features = num_features(dim)

    def forward(self, x: Tensor) -> Tensor:
        return taylor_features(x)


FEATURE_MAPS: dict[FeatureMapName, type[FeatureMap]] = {
    "elu": ELU,
    "relu": ReLU,
    "hedgehog": Hedgehog,
    "taylor": Taylor,
}
