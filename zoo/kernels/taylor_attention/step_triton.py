"""One token of a decode in one kernel: the state is read once and the next one written once, features stay inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.backend import check_step
from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.launch import Config, check_launch, configured, rows, step_op
from zoo.kernels.taylor_attention.features import num_features


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    S, z = (None, None) if initial_state is None else initial_state
    S, z = (check_step("taylor_attention", q.shape[1], x).float() for x in (S, z))
    check_launch("taylor_attention", q, k, v)
    o, S, z = _op(q[:, 0], k[:, 0], v[:, 0], S, z, eps)
    return o[:, None], (S, z)


def _step(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (B, H, K), v (B, H, V) -> o (B, H, V), S, z."""
    B, H, K = q.shape
    V = v.shape[2]
    q, k, v, S, z = rows(q), rows(k), rows(v), S.contiguous(), z.contiguous()
    o, S_after, z_after = v.new_empty(B, H, V), torch.empty_like(S), torch.empty_like(z)
    config = configured("taylor_attention.step", step_config, K, V)
    step_kernel[(B * H * triton.cdiv(V, config.block),)](
        q, k, v, S, z, o, S_after, z_after, H, eps, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        K=K, V=V, F=num_features(K), BLOCK=config.block, ROWS=config.chunk,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return o, S_after, z_after


def _fake(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), S.new_empty(S.shape), z.new_empty(z.shape)


_op = step_op("taylor_attention_step", _step, _fake)


def step_config(K: int, V: int) -> Config:
    """A chunk is features here, those of which a program holds the state at a time."""
    return Config(64 if K <= 32 else 128, min(triton.next_power_of_2(V), 16), 1 if K <= 32 else 4, 1)


@kernel
def step_kernel(
    q, k, v, S, z, o, S_after, z_after, H, eps, q_b, q_h, k_b, k_h, v_b, v_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and BLOCK columns of the state, ROWS features at a time."""
    wait_for_earlier()
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % blocks
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    q += head // H * q_b + head % H * q_h
    k += head // H * k_b + head % H * k_h
    j = block * BLOCK + tl.arange(0, BLOCK)
    b_v = tl.load(v + head // H * v_b + head % H * v_h + j, mask=j < V, other=0.0).to(tl.float32)
    terms = tl.zeros((ROWS, BLOCK), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    for first in tl.static_range(0, F, ROWS):
        f = first + tl.arange(0, ROWS)
        at = (head * F + f[:, None]) * V + j[None, :]
        inside = (f < F)[:, None] & (j < V)[None, :]
        now = tl.load(S + at, mask=inside, other=0.0)
        z_now = tl.load(z + head * F + f, mask=f < F, other=0.0)
        left, right, weight = feature(f, K)
        phi_q, phi_k = product(q, left, right, K) * weight, product(k, left, right, K) * weight
        now += phi_k[:, None] * b_v[None, :]
        z_now += phi_k
        terms += now * phi_q[:, None]
        weights += z_now * phi_q
        tl.store(S_after + at, now, mask=inside)
        if block == 0:
            tl.store(z_after + head * F + f, z_now, mask=f < F)
    total = tl.sum(terms, 0) / (tl.sum(weights) + eps)
    tl.store(o + head * V + j, total.to(o.dtype.element_ty), mask=j < V)


@triton.jit
def feature(f, K: tl.constexpr):
    """The two channels of feature f, K standing for the factor 1, -1 where f >= F; and its weight."""
    pair = f - 1 - K
    left = tl.zeros_like(f)
    for m in tl.static_range(1, K):
        left += (pair >= m * K - m * (m - 1) // 2).to(tl.int32)
    right = pair - (left * K - left * (left - 1) // 2) + left
    weight = tl.where(left == right, 0.7071067811865476, 1.0) * (1.0 / K) ** 0.5
    single = pair < 0
    left = tl.where(single, K, left)
    right = tl.where(single, tl.where(f == 0, K, f - 1), right)
    weight = tl.where(single, tl.where(f == 0, 1.0, (1.0 / K) ** 0.25), weight)
    valid = f < 1 + K + K * (K + 1) // 2
    return tl.where(valid, left, -1), tl.where(valid, right, -1), weight


@triton.jit
def product(x, left, right, K: tl.constexpr):
    """Of the two factors of features: 1 for channel K, 0 where there is no feature."""
    x_left = tl.load(x + left, mask=(left >= 0) & (left < K), other=1.0).to(tl.float32)
    x_right = tl.load(x + right, mask=(right >= 0) & (right < K), other=1.0).to(tl.float32)
    return tl.where(left >= 0, x_left * x_right, 0.0)
