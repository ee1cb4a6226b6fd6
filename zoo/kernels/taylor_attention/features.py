"""phi, the features whose products are the second-order Taylor polynomial of exp."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def num_features(K: int) -> int:
    """F = 1 + K + K(K+1)/2."""
    return (K + 1) * (K + 2) // 2


def taylor_features(x: Tensor) -> Tensor:
    """phi(x), (..., K) -> (..., F), such that phi(q).phi(k) = 1 + s + s^2/2 with s = q.k / sqrt(K).

    With y = [1, x / K^(1/4)] they are the products y_i y_j, i <= j, row by row: (0,0) (0,1) ... (1,1) (1,2) ...; that
    is 1, then x, then the second order. A square y_i^2, i > 0, is divided by sqrt(2); a product of two channels stands
    for its mirror image too, which makes its weight sqrt(2) as large.

    References: BASED, arXiv 2402.18668, section 4.1, there with all K^2 products.
    """
    K = x.shape[-1]
    y = pad(x * K**-0.25, (1, 0), value=1.0)
    i, j = torch.triu_indices(K + 1, K + 1, device=x.device)
    # Products with one-hot columns: exact, and with a gradient several times as fast as an index's.
    one_hot = torch.eye(K + 1, dtype=x.dtype, device=x.device)
    weight = torch.ones_like(one_hot[0, i]).masked_fill((i == j) & (i > 0), 0.5**0.5)
    return (y @ one_hot[:, i]) * (y @ (one_hot[:, j] * weight))
