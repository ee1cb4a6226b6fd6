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

CHUNK = 128


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
    C = T if max(4 * num_features(K), CHUNK) >= T else CHUNK  # as measured
    one = torch.ones_like(v[..., :1])
    q, k, v = (_to_chunks(x.to(dtype), C) for x in (q, k, v))
    scores = _TaylorScores.apply((q * K**-0.5) @ k.mT)
    numerator, weight = scores @ v, scores.sum(-1, keepdim=True)
    S = z = None
    if initial_state is not None or C < T or return_state:
        S_0, z_0 = (None, None) if initial_state is None else initial_state
        phi_q, phi_k = taylor_features(q), taylor_features(k)
        # 1 for a token and 0 for the padding: the padding's features are not 0.
        one = _to_chunks(one.to(dtype), C)
        S_before, S = _sums(S_0, phi_k.mT @ v)
        z_before, z = _sums(z_0, (phi_k.mT @ one).squeeze(-1))
        numerator = numerator + phi_q @ S_before
        weight = weight + phi_q @ z_before[..., None]
    o = (numerator / (weight + eps)).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T].to(out_dtype)
    if not return_state:
        return o, None
    assert S is not None
    assert z is not None
    return o, (S, z)


def _sums(x: Tensor | None, added: Tensor) -> tuple[Tensor, Tensor]:
    """The sum before each chunk, and after the last, of what the chunks add (B, H, N, ...) to x."""
    x = torch.zeros_like(added[:, :, 0]) if x is None else x.to(added.dtype)
    before = []
    for added_n in added.unbind(2):
        before.append(x)
        x = x + added_n
    return before[0].unsqueeze(2) if len(before) == 1 else torch.stack(before, dim=2), x


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
