"""A program takes blocks of rows, one token each, and makes all N mixtures of them."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier


@triton.jit
def _load(x, row, column, mask, D: tl.constexpr):
    return tl.load(x + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _change(x, previous, row, sequence, t, column, live, inside, HAS_PREVIOUS: tl.constexpr, D: tl.constexpr):
    """x_t, and x_{t-1} - x_t."""
    here = _load(x, row, column, live[:, None] & inside[None, :], D)
    before = _load(x, row - 1, column, (live & (t > 0))[:, None] & inside[None, :], D)
    if HAS_PREVIOUS:
        before += _load(previous, sequence, column, (live & (t == 0))[:, None] & inside[None, :], D)
    return here, before - here


@triton.jit
def _share(weight, offset, row, at, M, column, live, inside, HAS_OFFSET: tl.constexpr, D: tl.constexpr):
    """The share of the token before in rows of the mixture whose number among those of all groups is `at`."""
    # A whole tile, as the products have it: a row would change its layout, by shared memory and barriers, every time.
    share = _load(weight, row * 0 + at, column, (row >= 0)[:, None] & inside[None, :], D)
    if HAS_OFFSET:
        share = share + _load(offset, row + at.to(tl.int64) * M, column, live[:, None] & inside[None, :], D)
    return share


@kernel
def forward_kernel(
    x, weight, offset, previous, ys, B, T, steps, parts,
    HAS_OFFSET: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    wait_for_earlier()
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    M = B * T
    first = group.to(tl.int64) * M
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    for step in range(steps):
        token = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        live, row = token < M, first + token
        here, change = _change(
            x, previous, row, group.to(tl.int64) * B + token // T, token % T, column, live, inside, HAS_PREVIOUS, D
        )
        for i in tl.static_range(N):
            share = _share(weight, offset, token, group * N + i, M, column, live, inside, HAS_OFFSET, D)
            to = ys[i] + row[:, None] * D + column[None, :]
            y = here + change * share
            tl.store(to, y.to(ys[i].dtype.element_ty), mask=live[:, None] & inside[None, :])


@kernel(do_not_specialize=["steps", "parts"])
def backward_kernel(
    x, weight, offset, previous, dys, dx, sums, doffset, dprevious, B, T, steps, parts,
    HAS_OFFSET: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sums (groups, parts, N, D): the gradient of the weight, summed over a program's rows. Each of these goes back
    through `steps` tokens, so that what the token after it passes to a token is at hand."""
    wait_for_earlier()
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    M = B * T
    first = group.to(tl.int64) * M
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    end = (part * ROWS + tl.arange(0, ROWS) + 1) * steps
    passed = tl.zeros([ROWS, BLOCK_D], tl.float32)
    after = (end < M) & (end % T > 0)
    for i in tl.static_range(N):
        share = _share(weight, offset, end, group * N + i, M, column, after, inside, HAS_OFFSET, D)
        passed += _load(dys[i], first + end, column, after[:, None] & inside[None, :], D) * share
    dweight = (tl.zeros([ROWS, BLOCK_D], tl.float32),) * N
    for step in range(steps):
        token = end - 1 - step
        t = token % T
        live, row = token < M, first + token
        sequence = group.to(tl.int64) * B + token // T
        change = _change(x, previous, row, sequence, t, column, live, inside, HAS_PREVIOUS, D)[1]
        mask = live[:, None] & inside[None, :]
        slope = tl.where((t < T - 1)[:, None], passed, 0.0)
        passed = tl.zeros([ROWS, BLOCK_D], tl.float32)
        totals = ()
        for i in tl.static_range(N):
            at = group * N + i
            share = _share(weight, offset, token, at, M, column, live, inside, HAS_OFFSET, D)
            dy = _load(dys[i], row, column, mask, D)
            passed += dy * share
            slope += dy
            dshare = dy * change
            totals = totals + (dweight[i] + dshare,)  # type: ignore[assignment]  # noqa: RUF005
            if HAS_OFFSET:
                to = doffset + (at.to(tl.int64) * M + token)[:, None] * D + column[None, :]
                tl.store(to, dshare.to(doffset.dtype.element_ty), mask=mask)
        dweight = totals
        tl.store(dx + row[:, None] * D + column[None, :], (slope - passed).to(dx.dtype.element_ty), mask=mask)
        if HAS_PREVIOUS:
            to = dprevious + sequence[:, None] * D + column[None, :]
            tl.store(to, passed.to(dprevious.dtype.element_ty), mask=(live & (t == 0))[:, None] & inside[None, :])
    for each in tl.static_range(N):
        tl.store(sums + (tl.program_id(0) * N + each) * D + column, tl.sum(dweight[each], 0), mask=inside)
