"""What the kernels of both directions are made of.

One program a sequence and 32 channels walks time with the states of its channels in registers. A tile of states is
(LANES, NT, NK, NI): state (nt * NK + nk) * NI + ni. A thread has up to 16 states of one channel, so that up to there
the sums over states, y, dx and ddt, stay within it. What has no state axis is loaded as (LANES, NT). Strides of time
are constants of the kernel, and so is whether all chunks of S = 4 steps are whole, which spares it most of its integer
arithmetic and masks. All is loaded a chunk ahead of its use, B and C once for all threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.tiles import LOG2E


@triton.jit
def indices(
    D: tl.constexpr, N: tl.constexpr, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The block, the sequence; channels; where channels and states lie in (D, N), and which of them there are."""
    blocks: tl.constexpr = (D + LANES - 1) // LANES
    block = tl.program_id(0) % blocks
    b = tl.cast(tl.program_id(0) // blocks, tl.int64)
    d = tl.broadcast_to(block * LANES + tl.arange(0, LANES)[:, None], (LANES, NT))
    n = tl.arange(0, NT)[:, None, None] * NK + tl.arange(0, NK)[None, :, None]
    n = tl.broadcast_to((n * NI + tl.arange(0, NI)[None, None, :])[None], (LANES, NT, NK, NI))
    inside = (d < D)[:, :, None, None] & (n < N)
    return block, b, d, d[:, :, None, None] * N + n, inside


@triton.jit
def channels(d, i: tl.constexpr, live, D: tl.constexpr, WHOLE: tl.constexpr):
    """The channels there are in step i of a chunk that has `live` of them; WHOLE: all chunks have all their steps."""
    return d < D if WHOLE else d < tl.where(i < live, D, 0)


@triton.jit
def load_steps(x, stride: tl.constexpr, d, live, D: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr):
    """A tuple of the S steps from x on; zeros past the end."""
    steps = ()
    for i in tl.static_range(S):
        step = tl.load(x + i * stride + d, mask=channels(d, i, live, D, WHOLE), other=0.0)
        steps = steps + (step,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
    return steps


@triton.jit
def four_rows(P, Q, P_t: tl.constexpr, Q_t: tl.constexpr, N_PADDED: tl.constexpr):
    """(4, N_PADDED), where P and Q of one step and of the next lie.

    Whole rows for many threads: those of one Triton would rather load in each thread anew than hand on.
    """
    n, row = tl.arange(0, N_PADDED)[None, :], tl.arange(0, 4)[:, None]
    return tl.where(row % 2 == 0, P + row // 2 * P_t, Q + row // 2 * Q_t) + n


@triton.jit
def moved(rows, steps, P_t: tl.constexpr, Q_t: tl.constexpr):
    """Rows of P and Q by turns, `steps` further in time."""
    if P_t == Q_t:
        return rows + steps * P_t
    else:
        return rows + tl.where((tl.arange(0, 4) % 2 == 0)[:, None], steps * P_t, steps * Q_t)


@triton.jit
def load_step_rows(
    rows, own, i: tl.constexpr, live, P_t: tl.constexpr, Q_t: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Rows, of steps `own` of a chunk, i steps further; past the end, where x and dy are zero, the last step's."""
    steps = i if WHOLE else tl.maximum(tl.minimum(i + own, live - 1), 0) - own
    n = tl.arange(0, rows.shape[1])[None, :]
    return tl.load(moved(rows, steps, P_t, Q_t), mask=n < N, other=0.0)


@triton.jit
def load_terms(
    rows, live, P_t: tl.constexpr, Q_t: tl.constexpr, N: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """A tuple of P and Q of each two steps, rows as `four_rows` has them."""
    terms = ()
    for i in tl.static_range(0, S, 2):
        term = load_step_rows(rows, tl.arange(0, 4)[:, None] // 2, i, live, P_t, Q_t, N, WHOLE)
        terms = terms + (term,)  # type: ignore[assignment]  # noqa: RUF005
    return terms


@triton.jit
def spread(rows, NT: tl.constexpr, NK: tl.constexpr, NI: tl.constexpr, LANES: tl.constexpr):
    """Four rows for all channels, (LANES, NT, NK, NI) each."""
    rows = tl.reshape(tl.permute(rows.to(tl.float32), (1, 0)), (1, NT, NK, NI, 2, 2))
    even, odd = tl.split(tl.broadcast_to(rows, (LANES, NT, NK, NI, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def over_states(x):
    """(LANES, NT, NK, NI) -> (LANES, NT), the sum over all states."""
    sums = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])), 2)
    return tl.broadcast_to(tl.sum(sums, 1, keep_dims=True), (x.shape[0], x.shape[1]))


@triton.jit
def sigmoid(x):
    # A division costs more, for the sake of numbers that do not occur here.
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def softplus(x, EXACT: tl.constexpr):
    """Right to the last bits in fp32; if not EXACT, to 1e-5 of itself, less than the last bit of an x of 16 bits."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    if EXACT:
        # log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1 / 3.
        root = tl.rsqrt(2 + e)
        s = e * root * root
        q = s * s
        series = 1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))
        log = 2 * (s + s * q * (1 / 3 + q * (1 / 5 + q * series)))
    else:
        # log(1 + e) / e by the polynomial that has the least relative error for 0 < e <= 1.
        series = 0.325207662 + e * (-0.210050411 + e * (0.101223502 + e * -0.0238694144))
        log = e * (0.999991612 + e * (-0.499361584 + e * series))
    return tl.maximum(x, 0.0) + log


@triton.jit
def steps_of(dt, bias, live, S: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr):
    """The dt of each step of a chunk in fp32; none past the end."""
    steps = ()
    for i in tl.static_range(S):
        step = dt[i].to(tl.float32)
        if HAS_BIAS:
            step = softplus(step + bias, dt[i].dtype == tl.float32)
            if not WHOLE:
                step = tl.where(i < live, step, 0.0)
        steps = steps + (step,)  # type: ignore[assignment]  # noqa: RUF005
    return steps
