"""One program a sequence and block of channels walks time with the state of its channels in registers.

With p the largest exponent before a token and p' after it, a and b the sums over e^p, and every weight at most 1,

    past = e^{p - q}, now = e^{u + k - q}, q = max(p, u + k)        o = (past a + now v) / (past b + now)
    kept = e^{p + g - p'}, added = e^{k - p'}, p' = max(p + g, k)    a' = kept a + added v,   b' = kept b + added

The forward keeps the state before each chunk of S steps. The backward makes those within a chunk from it, holds them in
registers, and walks the chunk back with the slopes x, y of a, b. What sums are relative to changes no output: its slope
comes from the final state alone and goes to the token that the largest exponent is of. Both load a chunk ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.early import kernel, wait_for_earlier

NO_TOKEN = tl.constexpr(-1e38)


@triton.jit
def load_steps(x, stride: tl.constexpr, d, start, T, S: tl.constexpr, D: tl.constexpr):
    """A tuple of steps start, ..., start + S - 1, zeros from T on; x points to the first."""
    steps = ()
    for i in tl.static_range(S):
        steps = steps + (tl.load(x + i * stride, mask=d < tl.where(start + i < T, D, 0), other=0.0),)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no star
    return steps


@triton.jit
def weights(p, k, g, u):
    """past, now, kept, added and the next p."""
    now = u + k
    less = tl.exp(-tl.abs(p - now))
    top = tl.maximum(p + g, k)
    # p - p' first: then the exponent has what rounding p + g has cost.
    kept, added = tl.exp((p - top) + g), tl.exp(k - top)
    return tl.where(p < now, less, 1.0), tl.where(p < now, 1.0, less), kept, added, top


@kernel
def forward_kernel(
    k, v, decay, bonus, first, o, last, kept, T, per_group, k_b, v_b, k_t: tl.constexpr, v_t: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """first, last (B, 3, D): a, b and p. kept (B, chunks, 3, D): the states before each chunk."""
    wait_for_earlier()
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    sequence = tl.cast(tl.program_id(0) // blocks, tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    g = tl.load(decay + sequence // per_group * D + d, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(bonus + sequence // per_group * D + d, mask=inside, other=0.0).to(tl.float32)
    k += sequence * k_b + d
    v += sequence * v_b + d
    o += sequence * T * D + d
    kept += sequence * tl.cdiv(T, S) * 3 * D + d
    a, b = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    p = tl.full((BLOCK,), NO_TOKEN, tl.float32)
    if HAS_FIRST:
        first += sequence * 3 * D + d
        a, b = tl.load(first, mask=inside, other=0.0), tl.load(first + D, mask=inside, other=0.0)
        p = tl.load(first + 2 * D, mask=inside, other=0.0)
    ks, vs = load_steps(k, k_t, d, 0, T, S, D), load_steps(v, v_t, d, 0, T, S, D)
    for start in range(0, T, S):
        if KEEP:
            tl.store(kept, a, mask=inside)
            tl.store(kept + D, b, mask=inside)
            tl.store(kept + 2 * D, p, mask=inside)
            kept += 3 * D
        k += S * k_t
        v += S * v_t
        next_ks, next_vs = load_steps(k, k_t, d, start + S, T, S, D), load_steps(v, v_t, d, start + S, T, S, D)
        for i in tl.static_range(S):
            b_k, b_v = ks[i].to(tl.float32), vs[i].to(tl.float32)
            past, now, stays, added, top = weights(p, b_k, g, u)
            b_o = (past * a + now * b_v) / (past * b + now)
            tl.store(o + i * D, b_o.to(o.dtype.element_ty), mask=d < tl.where(start + i < T, D, 0))
            next_a, next_b = stays * a + added * b_v, stays * b + added
            if HAS_LAST:
                live = start + i < T
                next_a, next_b, top = tl.where(live, next_a, a), tl.where(live, next_b, b), tl.where(live, top, p)
            a, b, p = next_a, next_b, top
        o += S * D
        ks, vs = next_ks, next_vs
    if HAS_LAST:
        last += sequence * 3 * D + d
        tl.store(last, a, mask=inside)
        tl.store(last + D, b, mask=inside)
        tl.store(last + 2 * D, p, mask=inside)


@kernel
def backward_kernel(
    k, v, decay, bonus, kept, last, do, dlast, dk, dv, ddecay, dbonus, dfirst, T, per_group,
    k_b, v_b, do_b, k_t: tl.constexpr, v_t: tl.constexpr, do_t: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """ddecay, dbonus (B, D): a part a sequence."""
    wait_for_earlier()
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    sequence = tl.cast(tl.program_id(0) // blocks, tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    g = tl.load(decay + sequence // per_group * D + d, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(bonus + sequence // per_group * D + d, mask=inside, other=0.0).to(tl.float32)
    chunks = tl.cdiv(T, S)
    # From here on all of them point to the first step of a chunk, the last one to begin with.
    end = tl.cast(chunks - 1, tl.int64) * S
    k += sequence * k_b + end * k_t + d
    v += sequence * v_b + end * v_t + d
    do += sequence * do_b + end * do_t + d
    dk += (sequence * T + end) * D + d
    dv += (sequence * T + end) * D + d
    kept += (sequence * chunks + chunks - 1) * 3 * D + d
    x, y = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    dg, du = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    dp = tl.zeros((BLOCK,), tl.float32)
    if HAS_LAST:
        last += sequence * 3 * D + d
        dlast += sequence * 3 * D + d
        x, y = tl.load(dlast, mask=inside, other=0.0), tl.load(dlast + D, mask=inside, other=0.0)
        dp = tl.load(dlast + 2 * D, mask=inside, other=0.0)
        dp -= x * tl.load(last, mask=inside, other=0.0) + y * tl.load(last + D, mask=inside, other=0.0)

    start = (chunks - 1) * S
    a, b, p = load_state(kept, inside, D)
    ks, vs = load_steps(k, k_t, d, start, T, S, D), load_steps(v, v_t, d, start, T, S, D)
    dos = load_steps(do, do_t, d, start, T, S, D)
    for _ in range(chunks):
        # Of the chunk before; the first chunk loads itself again.
        more = tl.where(start > 0, 1, 0)
        kept -= more * 3 * D
        k -= more * S * k_t
        v -= more * S * v_t
        do -= more * S * do_t
        ahead = load_state(kept, inside, D)
        next_ks = load_steps(k, k_t, d, start - S * more, T, S, D)
        next_vs = load_steps(v, v_t, d, start - S * more, T, S, D)
        next_dos = load_steps(do, do_t, d, start - S * more, T, S, D)
        states = ()
        for i in tl.static_range(S):
            states = states + ((a, b, p),)  # type: ignore[assignment]  # noqa: RUF005
            b_k, b_v = ks[i].to(tl.float32), vs[i].to(tl.float32)
            _, _, stays, added, p = weights(p, b_k, g, u)
            a, b = stays * a + added * b_v, stays * b + added
        for i in tl.static_range(S - 1, -1, -1):
            live = start + i < T
            a, b, p = states[i]
            b_k, b_v, b_do = ks[i].to(tl.float32), vs[i].to(tl.float32), dos[i].to(tl.float32)
            past, now, stays, added, _ = weights(p, b_k, g, u)
            # Past the end do is zero; x, y, dg and dp must not change there.
            whole = 1 / (past * b + now)
            entering = b_do * past * whole
            b_o = (past * a + now * b_v) * whole
            # v - o would lose what the past has to say where the token outweighs it.
            through_now = entering * now * whole * (b_v * b - a)
            b_dk = added * (x * b_v + y) + through_now
            du += through_now
            dg += tl.where(live, stays * (a * x + b * y), 0.0)
            if HAS_LAST:
                fades = p + g >= b_k
                b_dk += tl.where(fades, 0.0, dp)
                dg += tl.where(live & fades, dp, 0.0)
                dp = tl.where(fades | (start + i >= T), dp, 0.0)
            here = d < tl.where(live, D, 0)
            tl.store(dk + i * D, b_dk.to(dk.dtype.element_ty), mask=here)
            tl.store(dv + i * D, (b_do * now * whole + added * x).to(dv.dtype.element_ty), mask=here)
            x, y = tl.where(live, entering + stays * x, x), tl.where(live, stays * y - entering * b_o, y)
        dk -= S * D
        dv -= S * D
        start -= S
        a, b, p = ahead
        ks, vs, dos = next_ks, next_vs, next_dos

    tl.store(ddecay + sequence * D + d, dg, mask=inside)
    tl.store(dbonus + sequence * D + d, du, mask=inside)
    if HAS_FIRST:
        dfirst += sequence * 3 * D + d
        tl.store(dfirst, x, mask=inside)
        tl.store(dfirst + D, y, mask=inside)
        # a and b are now those of the first chunk, loaded again.
        tl.store(dfirst + 2 * D, dp + a * x + b * y, mask=inside)


@triton.jit
def load_state(state, inside, D: tl.constexpr):
    a, b = tl.load(state, mask=inside, other=0.0), tl.load(state + D, mask=inside, other=0.0)
    return a, b, tl.load(state + 2 * D, mask=inside, other=0.0)
