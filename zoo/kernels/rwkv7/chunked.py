"""torch's own norms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.backend import state_dtype


def rwkv7_keys(
    k: Tensor, rate: Tensor, rate_bias: Tensor, removal: Tensor, replacement: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = k.to(state_dtype(k.dtype))
    eta = torch.sigmoid(rate_bias + rate)
    kappa = F.normalize(wide * removal, dim=-1, eps=eps)
    written = wide * (1 + (eta - 1) * replacement)
    return written.to(k.dtype), -kappa.to(k.dtype), (kappa * eta).to(k.dtype)


def rwkv7_readout(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, bonus: Tensor, eps: float
) -> Tensor:
    wide = state_dtype(o.dtype)
    normed = torch.addcmul(bias.to(wide), F.layer_norm(o.to(wide), o.shape[-1:], eps=eps), weight.to(wide))
    score = (q.to(wide) * k * bonus).sum(-1, keepdim=True)
    return (gate * torch.addcmul(normed, score, v.to(wide))).to(o.dtype)
