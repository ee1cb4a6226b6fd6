"""The parallel form: inside a chunk a triangular solve replaces the recurrence; the state goes from chunk to chunk.

Write G_t for the sum of g from the start of the chunk to t, and S for the state before it. The delta rule unrolls to

    w_t = v_t - S^T e^{G_t} k_t - sum_{s<t} [k_t^T diag(e^{G_t - G_s}) beta_s k_s] w_s
    o_t =       S^T e^{G_t} q_t + sum_{s<=t} [q_t^T diag(e^{G_t - G_s}) beta_s k_s] w_s

which is linear in w. The generalised rule has u_t = S_{t-1}^T a_t in place of w_t, and writes of two kinds, b_s u_s^T
and k_s v_s^T. Sources: arXiv 2406.06484, section 3; 2412.06464, section 3.3 (g per step); 2510.26692, section 3 (per
channel).

Only sums of g over a stretch are exponentiated, and each is summed by itself: a difference G_t - G_s of two long sums
would lose a small decay beside large ones. Where the caller bounds g, e^{G_t} e^{-G_s} does, and nothing overflows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zoo.kernels.backend import state_dtype

MAX_CHUNK = 32
# e^LARGEST is far from overflow in fp32.
LARGEST = 30.0


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    min_decay: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    q, k, write, w = _chunks(q, k, beta[..., None].to(state_dtype(v.dtype)) * k, v)
    chunk = _decayed([q, k], [], [write], decay, min_decay)
    (q, k), (read, mix) = chunk.readers, chunk.scores
    o, S = _scan(q, k, w, mix, read, None, chunk, initial_state, return_state)
    return _join(o, v), S


def generalized_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None = None,
    *,
    min_decay: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    q, k, minus_a, b, values = _chunks(q, k, -a, b, v)
    chunk = _decayed([q], [minus_a], [b, k], decay, min_decay)
    (q, minus_a), (read, mix) = chunk.readers, chunk.scores
    mix_b, mix_k = mix.chunk(2, dim=-1)
    o, S = _scan(q, minus_a, -(mix_k @ values), mix_b, read, values, chunk, initial_state, return_state)
    return _join(o, v), S


class _Chunk(NamedTuple):
    """What the decay makes of readers and writers and of the state; None is a factor of 1.

    scores: each reader's (B, H, chunks, C, W C) with the W writers beside each other, 0 where the write is not before
    it. readers (B, H, chunks, C, K) meet the state before the chunk, S; the next one is total * S + leave * (writers^T
    w), writers (B, H, chunks, W C, K).
    """

    scores: list[Tensor]
    readers: list[Tensor]
    writers: Tensor
    leave: Tensor | None
    total: Tensor | None


def _decayed(
    readers: list[Tensor], early: list[Tensor], writers: list[Tensor], decay: Tensor | None, min_decay: float | None
) -> _Chunk:
    """readers stand after the decay and the write of their step, `early` readers before both."""
    if decay is None:
        columns = _cat(writers, -2)
        return _Chunk(_products(readers, early, columns), readers + early, columns, None, None)
    (g,) = _chunks(decay if decay.dim() == 4 else decay[..., None])
    C = g.shape[-2]
    since = g.cumsum(-2)
    total = since[..., -1:, :].mT.exp()
    after, before = since.exp(), _later(since).exp()
    decayed = [x * after for x in readers] + [x * before for x in early]
    if min_decay is not None and -min_decay * C <= LARGEST:
        growth = (-since).exp()
        grown = _cat([x * growth for x in writers], -2)
        return _Chunk(_products(decayed[: len(readers)], decayed[len(readers) :], grown), decayed, grown, total, total)
    # A reader before step t is one after step t - 1.
    rows = readers + [_earlier(x) for x in early]
    if decay.dim() == 4:
        pairs = _ChannelScores.apply(g, len(rows), *rows, *writers)
    else:
        # The sum of g over s+1..t at (t, s).
        left = g.expand(*g.shape[:-1], C).tril(-1).cumsum(-2).exp().tril()
        pairs = [(r @ c.mT) * left for r in rows for c in writers]
    scores = [_cat(pairs[i : i + len(writers)], -1) for i in range(0, len(pairs), len(writers))]
    scores = scores[: len(readers)] + [_later(x) for x in scores[len(readers) :]]
    until = _suffix_sum(_earlier(g)).exp()
    return _Chunk(scores, decayed, _cat([x * until for x in writers], -2), None, total)


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _products(readers: list[Tensor], early: list[Tensor], columns: Tensor) -> list[Tensor]:
    C = (readers + early)[0].shape[-2]
    # A product with a mask, its gradient too, is several times as fast as tril.
    until = columns.new_ones(C, C).tril()
    before = until.tril(-1)
    until, before = (mask.repeat(1, columns.shape[-2] // C) for mask in (until, before))
    return [(r @ columns.mT) * until for r in readers] + [(r @ columns.mT) * before for r in early]


def _scan(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    mix: Tensor,
    read: Tensor,
    values: Tensor | None,
    chunk: _Chunk,
    S: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Chunk by chunk: w solves (I + tril(mix, -1)) w = w - k S; o = q S + read [w, values]; S += writers^T [w, values].

    S None stands for zeros. Returns o (B, H, T, V), the last chunk whole, and the state.
    """
    S = None if S is None else S.to(w.dtype)
    chunks = w.shape[2]
    absent: tuple[Tensor | None, ...] = (None,) * chunks
    given = [_each(x) for x in (q, k, w, mix, read, chunk.writers)]
    optional = [absent if x is None else _each(x) for x in (values, chunk.leave, chunk.total)]
    outputs = []
    for n, (q, k, w, mix, read, write, v, leave, total) in enumerate(zip(*given, *optional, strict=True)):
        w = w if S is None else w - k @ S
        w = torch.linalg.solve_triangular(mix, w, upper=False, unitriangular=True)
        w = w if v is None else torch.cat([w, v], dim=-2)
        outputs.append(read @ w if S is None else read @ w + q @ S)
        if return_state or n < chunks - 1:
            written = _scale(write.mT @ w, leave)
            S = written if S is None else written + _scale(S, total)
    return _cat(outputs, 2), S if return_state else None


def _each(x: Tensor) -> tuple[Tensor, ...]:
    """The chunks of x, each (B, H, C, X). The gradient of unbind is a copy, so it is left out where it can be."""
    return (x.squeeze(2),) if x.shape[2] == 1 else x.unbind(2)


def _scale(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _chunks(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, K) -> (B, H, chunks, C, K) in the accumulation dtype, zeros after the end: they change no state."""
    T = tensors[0].shape[1]
    C = min(MAX_CHUNK, 1 << (T - 1).bit_length())
    tensors = tuple(x.to(state_dtype(x.dtype)).transpose(1, 2) for x in tensors)
    if T % C:
        tensors = tuple(F.pad(x, (0, 0, 0, -T % C)) for x in tensors)
    return tuple(x.unflatten(2, (-1, C)).contiguous() for x in tensors)


def _join(o: Tensor, v: Tensor) -> Tensor:
    """(B, H, T and padding, V) -> (B, T, H, V), as v."""
    return o[:, :, : v.shape[1]].transpose(1, 2).to(v.dtype)


def _earlier(x: Tensor) -> Tensor:
    """Row t + 1 at t, within each chunk; zeros last."""
    return F.pad(x, (0, 0, -1, 1))


def _later(x: Tensor) -> Tensor:
    """Row t - 1 at t, within each chunk; zeros first."""
    return F.pad(x, (0, 0, 1, -1))


def _suffix_sum(x: Tensor) -> Tensor:
    """sum_{s >= t} x_s over the axis before the last."""
    return x.flip(-2).cumsum(-2).flip(-2)


class _ChannelScores(torch.autograd.Function):
    """row_t^T diag(e^{G_t - G_s}) column_s for s <= t, else 0, of each pair, where every channel has its own decay.

    By halving: of two neighbouring blocks of m steps take t in the later, s in the earlier one. e^{G_t - G_s} is the
    decay since their border times the decay until it, neither above 1, so the scores across are one product. Then m
    doubles. On the diagonal nothing decays.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, R: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, *tensors)
        ctx.R = R
        rows, columns = tensors[:R], tensors[R:]
        scores = [torch.diag_embed((r * c).sum(-1)) for r in rows for c in columns]
        for m, since, until in _borders(g):
            later = [_halves(x, m)[1] * since for x in rows]
            earlier = [_halves(x, m)[0] * until for x in columns]
            for score, (r, c) in zip(scores, itertools.product(later, earlier), strict=True):
                _across(score, m).copy_(r @ c.mT)
        return tuple(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_scores: Tensor) -> tuple[Any, ...]:
        g, *tensors = ctx.saved_tensors
        rows, columns = tensors[: ctx.R], tensors[ctx.R :]
        d_rows, d_columns = [torch.zeros_like(x) for x in rows], [torch.zeros_like(x) for x in columns]
        pairs = list(itertools.product(range(len(rows)), range(len(columns))))
        for m, since, until in _borders(g):
            later = [_halves(x, m)[1] * since for x in rows]
            earlier = [_halves(x, m)[0] * until for x in columns]
            for d_score, (i, j) in zip(d_scores, pairs, strict=True):
                d = _across(d_score, m)
                _halves(d_rows[i], m)[1].addcmul_(d @ earlier[j], since)
                _halves(d_columns[j], m)[0].addcmul_(d.mT @ later[i], until)
        # e^{G_t} stands beside row t and e^{-G_t} beside column t.
        d_G = torch.zeros_like(g)
        for x, d in zip(rows, d_rows, strict=True):
            d_G.addcmul_(x, d)
        for x, d in zip(columns, d_columns, strict=True):
            d_G.addcmul_(x, d, value=-1)
        for d_score, (i, j) in zip(d_scores, pairs, strict=True):
            d = d_score.diagonal(dim1=-2, dim2=-1)[..., None]
            d_rows[i].addcmul_(d, columns[j])
            d_columns[j].addcmul_(d, rows[i])
        return _suffix_sum(d_G), None, *d_rows, *d_columns


def _borders(g: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Block lengths m = 1, 2, 4, ..., and the decay since, and until, the border of each pair (..., pairs, m, K)."""
    since, until = g.clone(), torch.zeros_like(g)
    m = 1
    while m < g.shape[-2]:
        (first_since, second_since), (first_until, _) = _halves(since, m), _halves(until, m)
        yield m, second_since.exp(), first_until.exp()
        first, second = first_since[..., -1:, :].clone(), second_since[..., -1:, :].clone()
        second_since += first
        first_until += second
        m *= 2


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Views of the first and the second of every two blocks of m steps: (..., C, K) -> (..., pairs, m, K), twice."""
    first, second = x.unflatten(-2, (-1, 2, m)).unbind(-3)
    return first, second


def _across(scores: Tensor, m: int) -> Tensor:
    """A view of the scores of second blocks' rows with first blocks' columns: (..., C, C) -> (..., pairs, m, m)."""
    columns = _halves(scores.mT, m)[0].mT
    return _halves(columns, m)[1].diagonal(dim1=-4, dim2=-3).movedim(-1, -3)
