"""The parallel form: inside a chunk the polynomial of the scores, between chunks the sums over phi's features.

Short sequences are one chunk and need no features: quadratic in T, but a score is cheaper than F products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo.kernels.backend import state_dtype
from zoo.kernels.taylor_attention.features import num_features, taylor_features


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    T, K = q.shape[1], q.shape[3]
    out_dtype, dtype = v.dtype, state_dtype(v.dtype)
    C = 128 if T > 4 * num_features(K) else T  # as measured
    # A column of ones beside v makes z one more column of S. In the padding it is 0: those tokens have no weight.
    q, k, v = (_to_chunks(x.to(dtype), C) for x in (q, k, pad(v, (0, 1), value=1.0)))
    o = _TaylorScores.apply((q * K**-0.5) @ k.mT) @ v
    if initial_state is not None or C < T or return_state:
        added = taylor_features(k).mT @ v
        if initial_state is None:
            S_0 = torch.zeros_like(added[:, :, 0])
        else:
            S_0 = torch.cat([initial_state[0], initial_state[1][..., None]], dim=-1).to(dtype)
        S = torch.cat([S_0[:, :, None], added], dim=2).cumsum(2)
        o = o + taylor_features(q) @ S[:, :, :-1]
    o = (o[..., :-1] / (o[..., -1:] + eps)).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T].to(out_dtype)
    return o, (S[:, :, -1, :, :-1], S[:, :, -1, :, -1]) if return_state else None


def _to_chunks(x: Tensor, C: int) -> Tensor:
    """(B, T, H, X) -> (B, H, N, C, X), with zeros behind the last token."""
    missing = -x.shape[1] % C
    x = pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return x.unflatten(1, (-1, C)).permute(0, 3, 1, 2, 4).contiguous()


class _TaylorScores(torch.autograd.Function):
    """1 + s + s^2/2 for the past and the present, 0 for the future; its derivative is 1 + s."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor) -> Tensor:
        return torch.addcmul(s, s, s, value=0.5).add_(1.0).mul_(_causal(s))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> Tensor:
        (s,) = ctx.saved_tensors
        return torch.addcmul(d_scores, d_scores, s).mul_(_causal(s))


def _causal(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=s.dtype, device=s.device).tril()
