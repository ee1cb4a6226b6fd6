"""RWKV-7's own work around the generalised delta rule: its keys before, and what it adds to the read-out after."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels.backend import backend
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


class RWKV7Keys(NamedTuple):
    """What `generalized_delta_rule` takes: k, a and b, each (B, T, H, K)."""

    k: Tensor
    a: Tensor
    b: Tensor


def rwkv7_keys(
    k: Tensor,
    rate: Tensor,
    rate_bias: Tensor,
    removal: Tensor,
    replacement: Tensor,
    *,
    eps: float = 1e-12,
    impl: str | None = None,
) -> RWKV7Keys:
    """The key that is written, and the pair that removes what an older key wrote (arXiv 2503.14456, eq. 4, 6 and 15).

        eta = sigmoid(rate_bias + rate);   kappa = removal * k / max(|removal * k|, eps)
        k' = k * (1 + (eta - 1) * replacement);   a = -kappa;   b = kappa * eta

    In fp32 (fp64 for fp64 inputs) whatever the dtypes.

    Args:
        k, rate: (B, T, H, K).
        rate_bias, removal, replacement: (H, K).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        k', a and b (B, T, H, K) in k's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    check_shapes(
        "rwkv7_keys",
        k=(k, "BTHK"),
        rate=(rate, "BTHK"),
        rate_bias=(rate_bias, "HK"),
        removal=(removal, "HK"),
        replacement=(replacement, "HK"),
    )
    module = backend(__name__, IMPLS, impl, k.device)
    with torch.autocast(k.device.type, enabled=False):
        return RWKV7Keys(*module.rwkv7_keys(k, rate, rate_bias, removal, replacement, eps))


def rwkv7_readout(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    bonus: Tensor,
    *,
    eps: float = 64e-5,
    impl: str | None = None,
) -> Tensor:
    """y = gate * (norm(o) + (q . (bonus * k)) v), head by head (arXiv 2503.14456, eq. 20 to 22).

    norm(o) = weight * (o - mean) / sqrt(var + eps) + bias over the channels of a head. In fp32 (fp64 for fp64 inputs)
    whatever the dtypes.

    Args:
        o, q, k, v, gate: (B, T, H, K), o the state read by q.
        weight, bias, bonus: (H, K).
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        y (B, T, H, K) in o's dtype.

    Raises:
        UnsupportedError: shapes do not fit, or there is no such backend.
    """
    check_shapes(
        "rwkv7_readout",
        o=(o, "BTHK"),
        q=(q, "BTHK"),
        k=(k, "BTHK"),
        v=(v, "BTHK"),
        gate=(gate, "BTHK"),
        weight=(weight, "HK"),
        bias=(bias, "HK"),
        bonus=(bonus, "HK"),
    )
    module = backend(__name__, IMPLS, impl, o.device)
    with torch.autocast(o.device.type, enabled=False):
        return module.rwkv7_readout(o, q, k, v, gate, weight, bias, bonus, eps)
