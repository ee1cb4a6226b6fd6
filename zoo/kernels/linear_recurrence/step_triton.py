"""One token of a decode in one kernel: the state is read once and the next one written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.backend import check_step
from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.launch import check_launch, configured, rows, state_tile, step_op


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
) -> tuple[Tensor, Tensor]:
    S = check_step("linear_recurrence", q.shape[1], initial_state)
    check_launch("linear_recurrence", q, k, v)
    if decay is not None:
        decay = decay[None] if decay.dim() == 1 else decay[:, 0]
    bonus, skip = (None if x is None else x[None] for x in (bonus, skip))
    o, S = _op(q[:, 0], k[:, 0], v[:, 0], decay, bonus, skip, S.float())
    return o[:, None], S


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    skip: Tensor | None,
    S: Tensor,
) -> tuple[Tensor, Tensor]:
    """q, k (B, H, K), v (B, H, V), decay (G, H) or (G, H, K), bonus (G, H, K), skip (G, H), G a divisor of B."""
    B, H, K = q.shape
    V = v.shape[2]
    q, k, v, S = rows(q), rows(k), rows(v), S.contiguous()
    g = q if decay is None else (decay.contiguous() if decay.dim() == 3 else decay)
    u = q if bonus is None else bonus.contiguous()
    through = q if skip is None else skip.contiguous()
    o, after = v.new_empty(B, H, V), torch.empty_like(S)
    config = configured("linear_recurrence.step", state_tile, K, V)
    step_kernel[(B * H * triton.cdiv(V, config.block),)](
        q, k, v, g, u, through, S, o, after, H, B // g.shape[0], B // u.shape[0], B // through.shape[0],
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *g.stride()[:2],
        K=K, V=V, BLOCK_K=triton.next_power_of_2(K), BLOCK=config.block, DECAY=0 if decay is None else decay.dim(),
        BONUS=bonus is not None, SKIP=skip is not None, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return o, after


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    skip: Tensor | None,
    S: Tensor,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), S.new_empty(S.shape)


_op = step_op("linear_recurrence_step", _step, _fake)


@kernel
def step_kernel(
    q, k, v, g, u, skip, S, o, after, H, g_share, u_share, skip_share, q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, BONUS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and BLOCK columns of the state."""
    wait_for_earlier()
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b, h = head // H, head % H
    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = (head * K + i[:, None]) * V + j[None, :]
    inside = (i < K)[:, None] & (j < V)[None, :]
    before = tl.load(S + at, mask=inside, other=0.0)
    b_q = tl.load(q + b * q_b + h * q_h + i, mask=i < K, other=0.0).to(tl.float32)
    b_k = tl.load(k + b * k_b + h * k_h + i, mask=i < K, other=0.0).to(tl.float32)
    b_v = tl.load(v + b * v_b + h * v_h + j, mask=j < V, other=0.0).to(tl.float32)
    kv = b_k[:, None] * b_v[None, :]
    g += b // g_share * g_b + h * g_h
    if DECAY == 3:
        now = before * tl.exp(tl.load(g + i, mask=i < K, other=0.0).to(tl.float32))[:, None] + kv
    elif DECAY == 2:
        now = before * tl.exp(tl.load(g).to(tl.float32)) + kv
    else:
        now = before + kv
    tl.store(after + at, now, mask=inside)
    if BONUS:
        now = before + kv * tl.load(u + (b // u_share * H + h) * K + i, mask=i < K, other=0.0).to(tl.float32)[:, None]
    b_o = tl.sum(now * b_q[:, None], 0)
    if SKIP:
        b_o += tl.load(skip + b // skip_share * H + h).to(tl.float32) * b_v
    tl.store(o + head * V + j, b_o.to(o.dtype.element_ty), mask=j < V)
