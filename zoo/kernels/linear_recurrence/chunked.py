"""The parallel form: matrix products inside chunks of time, a short loop over the state between them.

Shape letters: B batch, H heads, N chunks, C tokens in a chunk (a power of 2), K key and V value channels. A decay is
(B, H, N, C, K), or (B, H, N, C, 1) where the channels of a head share it; its B is 1 where the batch shares it.

What is left of token s at token t is exp(g_{s+1} + ... + g_t). It is never formed as a ratio of cumulative decays,
which overflows, nor as exp of a difference of two large sums, which cancels. Where channels share a decay, each sum is
taken by itself. Where they do not, what is left is a product of factors <= 1: in a block of 2h tokens the first h reach
the last h through its middle, and

    left(s, t) = left(s, middle) * left(middle, t)

splits over the two operands of a matrix product. Doubling h from 1 to C/2 covers every pair s < t once, and doubles
the two factors by one multiplication each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo.kernels.backend import state_dtype


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    out_dtype, dtype = v.dtype, state_dtype(v.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    g = None if decay is None else _per_step(decay.to(dtype), q)
    S = None if initial_state is None else initial_state.to(dtype)
    if bonus is None:
        o, S = _inclusive(q, k, v, g, S, return_state)
    else:
        # o_t reads S_{t-1}, as if the query came one step earlier; the first one reads the initial state.
        first = torch.zeros_like(v[:, :1]) if S is None else torch.einsum("bhk,bhkv->bhv", q[:, 0], S)[:, None]
        o, S = _inclusive(pad(q[:, 1:], (0, 0, 0, 0, 0, 1)), k, v, g, S, return_state)
        o = torch.cat([first, o[:, :-1]], dim=1) + (q * bonus.to(dtype) * k).sum(-1, keepdim=True) * v
    if skip is not None:
        o = o + skip.to(dtype)[:, None] * v
    return o.to(out_dtype), S


def _inclusive(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """o_t = S_t^T q_t with g (B, T, H, K or 1)."""
    T = q.shape[1]
    C = _chunk_size(T, q.shape[-1] * v.shape[-1])
    q, k, v = (_to_chunks(x, C) for x in (q, k, v))
    g = None if g is None else _to_chunks(g, C)
    if g is None:
        # A product with a mask, its gradient too, is several times as fast as tril.
        o = ((q @ k.mT) * q.new_ones(C, C).tril()) @ v
    elif g.shape[-1] == 1:
        o = _SharedDecay.apply(q, k, g)[0] @ v
    else:
        o = _ChannelDecay.apply(q, k, g) @ v
    if S is not None or C < T or return_state:
        read, write, kept = q, k, None
        if g is not None:
            since, until = g.cumsum(-2).exp(), _after(g).exp()
            read, write, kept = q * since, k * until, since[..., -1, :, None]
        before, S = _states(S, write.mT @ v, kept)
        o = o + read @ before
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T], S if return_state else None


def _after(g: Tensor) -> Tensor:
    """sum_{j > t} g_j within each chunk (..., C, X); summed by itself, since a difference of sums would cancel."""
    return pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _states(S: Tensor | None, kv: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each chunk (B, H, N, K, V), and the last one, from what each adds and what it keeps."""
    S = torch.zeros_like(kv[:, :, 0]) if S is None else S
    before = []
    # unbind, not indexing: the gradient of an index is a tensor of zeros as large as the whole.
    for kv_n, kept_n in zip(kv.unbind(2), [None] * kv.shape[2] if kept is None else kept.unbind(2), strict=True):
        before.append(S)
        S = S + kv_n if kept_n is None else torch.addcmul(kv_n, kept_n, S)
    return before[0].unsqueeze(2) if len(before) == 1 else torch.stack(before, dim=2), S


def _chunk_size(T: int, state: int) -> int:
    """A power of 2: longer chunks cost C per token, shorter ones one state each. As measured; all of T up to 64."""
    longest = 64 if T <= 64 or state >= 4096 else 32
    return min(longest, 1 << (T - 1).bit_length())


def _per_step(decay: Tensor, q: Tensor) -> Tensor:
    """(H,), (B, T, H) or (B, T, H, K) -> (1 or B, T, H, 1 or K)."""
    if decay.dim() == 1:
        # Spread over time, because the padding behind the last token must not decay.
        decay = decay.expand(1, q.shape[1], -1)
    return decay if decay.dim() == 4 else decay[..., None]


def _to_chunks(x: Tensor, C: int) -> Tensor:
    """(B, T, H, X) -> (B, H, N, C, X), with zeros behind the last token: no write, no decay."""
    missing = -x.shape[1] % C
    x = pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return x.unflatten(1, (-1, C)).permute(0, 3, 1, 2, 4).contiguous()


class _SharedDecay(torch.autograd.Function):
    """scores_ts = q_t.k_s left(s, t) for s <= t, else 0, with g (..., C, 1); and left (..., C, C), with no gradient.

    left(s, t) = exp(g_{s+1} + ... + g_t), each sum by itself. The gradient of g needs no products of its own: g_j is in
    every left(s, t) with s < j <= t, and the part of it that comes through token t is q_t dq_t, through token s
    -k_s dk_s.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        ones = g.new_ones(g.shape[-2], g.shape[-2])
        left = (g * ones.tril(-1)).cumsum(-2).exp() * ones.tril()
        return (q @ k.mT) * left, left

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, g, left = ctx.saved_tensors
        below = d_scores * left
        below.diagonal(dim1=-2, dim2=-1).zero_()
        dq, dk = below @ k, below.mT @ q
        through = (q * dq - k * dk).sum(-1, keepdim=True).sum_to_size(g.shape)
        return *_with_diagonal(d_scores, q, k, dq, dk), through.flip(-2).cumsum(-2).flip(-2)


class _ChannelDecay(torch.autograd.Function):
    """scores_ts = sum_c q_tc k_sc left(s, t)_c for s <= t, else 0, with g (..., C, K). The gradient: as above."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
        since, until = g.exp(), torch.ones_like(g)
        scores = torch.diag_embed((q * k).sum(-1))
        for h in _half_blocks(g):
            far, near = _second(q, h) * _second(since, h), _first(k, h) * _first(until, h)
            _block(scores, h).copy_(_matmul(far, near.mT))
            _double(since, until, h)
        return scores

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, g = ctx.saved_tensors
        since, until = g.exp(), torch.ones_like(g)
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for h in _half_blocks(g):
            block = _block(d_scores, h).contiguous()
            left_t, left_s = _second(since, h), _first(until, h)
            _second(dq, h).add_(_matmul(block, _first(k, h) * left_s).mul_(left_t))
            _first(dk, h).add_(_matmul(block.mT, _second(q, h) * left_t).mul_(left_s))
            _double(since, until, h)
        through = (q * dq - k * dk).sum_to_size(g.shape)
        return *_with_diagonal(d_scores, q, k, dq, dk), through.flip(-2).cumsum(-2).flip(-2)


def _with_diagonal(d_scores: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
    """left(t, t) = 1 whatever g is, and in the gradient of g it would cancel, but for rounding: it comes last."""
    diagonal = d_scores.diagonal(dim1=-2, dim2=-1)[..., None]
    return torch.addcmul(dq, diagonal, k), torch.addcmul(dk, diagonal, q)


def _half_blocks(x: Tensor) -> Iterator[int]:
    return (1 << i for i in range(x.shape[-2].bit_length() - 1))


def _first(x: Tensor, h: int) -> Tensor:
    """(..., C, X) -> (..., C/2h, h, X): the first half of each block of 2h tokens, a view."""
    return x.unflatten(-2, (-1, 2, h)).select(-3, 0)


def _second(x: Tensor, h: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, h)).select(-3, 1)


def _block(x: Tensor, h: int) -> Tensor:
    """(..., C, C) -> (..., C/2h, h, h): where second halves meet first halves of the same block, a view."""
    blocks = x.unflatten(-2, (-1, 2, h)).unflatten(-1, (-1, 2, h))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _double(since: Tensor, until: Tensor, h: int) -> None:
    """From the factors within blocks of h tokens to those within blocks of 2h, in place."""
    _first(until, h).mul_(_second(since, h)[..., -1:, :])
    _second(since, h).mul_(_first(since, h)[..., -1:, :])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; for the smallest blocks without the batched product, whose cost per matrix is then most of it."""
    return a @ b if a.shape[-2] > 2 else (a[..., None] * b[..., None, :, :]).sum(-2)
