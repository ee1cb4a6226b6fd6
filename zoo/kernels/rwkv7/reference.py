"""The definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.backend import state_dtype


def rwkv7_keys(
    k: Tensor, rate: Tensor, rate_bias: Tensor, removal: Tensor, replacement: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = state_dtype(k.dtype)
    eta = torch.sigmoid(rate_bias.to(wide) + rate.to(wide))
    kappa = removal.to(wide) * k.to(wide)
    kappa = kappa / kappa.square().sum(-1, keepdim=True).sqrt().clamp(min=eps)
    written = k.to(wide) * (1 + (eta - 1) * replacement.to(wide))
    return written.to(k.dtype), -kappa.to(k.dtype), (kappa * eta).to(k.dtype)


def rwkv7_readout(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, bonus: Tensor, eps: float
) -> Tensor:
    wide = state_dtype(o.dtype)
    weight, bias, bonus = (p.to(wide) for p in (weight, bias, bonus))
    centred = o.to(wide) - o.to(wide).mean(-1, keepdim=True)
    normed = weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias
    score = (q.to(wide) * bonus * k.to(wide)).sum(-1, keepdim=True)
    return (gate.to(wide) * (normed + score * v.to(wide))).to(o.dtype)
