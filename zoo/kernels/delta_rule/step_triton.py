"""One token of a decode in one kernel: the state is read once and the next one written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.backend import check_step
from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.launch import check_launch, configured, rows, state_tile, step_op


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
) -> tuple[Tensor, Tensor]:
    S = check_step("delta_rule", q.shape[1], initial_state)
    check_launch("delta_rule", q, k, v)
    decay = None if decay is None else decay[:, 0]
    o, S = _op(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], None, decay, S.float())
    return o[:, None], S


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
) -> tuple[Tensor, Tensor]:
    S = check_step("generalized_delta_rule", q.shape[1], initial_state)
    check_launch("generalized_delta_rule", q, k, v)
    decay = None if decay is None else decay[:, 0]
    o, S = _op(q[:, 0], k[:, 0], v[:, 0], a[:, 0], b[:, 0], decay, S.float())
    return o[:, None], S


def _step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None, decay: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor]:
    """The generalized rule; without b the delta rule, with a its beta (B, H). q, k (B, H, K), v (B, H, V) -> o, S."""
    B, H, K = q.shape
    V = v.shape[2]
    q, k, v, a, S = rows(q), rows(k), rows(v), rows(a), S.contiguous()
    low_rank = a if b is None else rows(b)
    g = a if decay is None else (rows(decay) if decay.dim() == 3 else decay)
    o, after = v.new_empty(B, H, V), torch.empty_like(S)
    config = configured("delta_rule.step", state_tile, K, V)
    step_kernel[(B * H * triton.cdiv(V, config.block),)](
        q, k, v, a, low_rank, g, S, o, after, H,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *a.stride()[:2], *low_rank.stride()[:2], *g.stride()[:2],
        K=K, V=V, BLOCK_K=triton.next_power_of_2(K), BLOCK=config.block, DECAY=0 if decay is None else decay.dim(),
        GENERALIZED=b is not None, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return o, after


def _fake(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None, decay: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), S.new_empty(S.shape)


_op = step_op("delta_rule_step", _step, _fake)


@kernel
def step_kernel(
    q, k, v, a, low_rank, g, S, o, after, H,
    q_b, q_h, k_b, k_h, v_b, v_h, a_b, a_h, l_b, l_h, g_b, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, GENERALIZED: tl.constexpr,
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
    g += b * g_b + h * g_h
    if DECAY == 3:
        kept = before * tl.exp(tl.load(g + i, mask=i < K, other=0.0).to(tl.float32))[:, None]
    elif DECAY == 2:
        kept = before * tl.exp(tl.load(g).to(tl.float32))
    else:
        kept = before
    if GENERALIZED:
        b_a = tl.load(a + b * a_b + h * a_h + i, mask=i < K, other=0.0).to(tl.float32)
        b_l = tl.load(low_rank + b * l_b + h * l_h + i, mask=i < K, other=0.0).to(tl.float32)
        held = tl.sum(before * b_a[:, None], 0)
        now = kept + b_l[:, None] * held[None, :] + b_k[:, None] * b_v[None, :]
    else:
        held = tl.sum(kept * b_k[:, None], 0)
        change = tl.load(a + b * a_b + h * a_h).to(tl.float32) * (b_v - held)
        now = kept + b_k[:, None] * change[None, :]
    tl.store(after + at, now, mask=inside)
    tl.store(o + head * V + j, tl.sum(now * b_q[:, None], 0).to(o.dtype.element_ty), mask=j < V)
