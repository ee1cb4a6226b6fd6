"""phi, the features whose products are the second-order Taylor polynomial of exp."""

from __future__ import annotations

import torch
from torch import Tensor


def num_features(K: int) -> int:
    """F = 1 + K + K(K+1)/2."""
    return 1 + K + K * (K + 1) // 2


def taylor_features(x: Tensor) -> Tensor:
    """phi(x), (..., K) -> (..., F), such that phi(q).phi(k) = 1 + s + s^2/2 with s = q.k / sqrt(K).

    In this order: 1; x_i / K^(1/4); then x_i x_j / sqrt(K) for i <= j, row by row (0,0) (0,1) ... (1,1) ..., those
    with i = j divided by sqrt(2): the products i < j stand for j < i too, so their weight is sqrt(2) as large.

    References: BASED, arXiv 2402.18668, section 4.1, there with all K^2 products.
    """
    K = x.shape[-1]
    x = x * K**-0.25
    i, j = torch.triu_indices(K, K, device=x.device)
    weight = torch.where(i == j, 0.5**0.5, 1.0).to(x.dtype)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * weight], dim=-1)
