"""One token of a decode in one kernel: the state is read once and the next one written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.backend import check_step
from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.launch import Config, check_launch, configured, rows, step_op
from zoo.kernels.wkv.kernels import weights


def wkv(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, initial_state: tuple[Tensor, ...] | None, return_state: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    a, b, p = (check_step("wkv", k.shape[1], x).float() for x in initial_state or (None,) * 3)
    check_launch("wkv", k, v, decay, bonus)
    # What is the same for every sequence has one sequence, or one for each model under vmap.
    o, *state = _op(k[:, 0], v[:, 0], decay[None], bonus[None], a, b, p)
    return o[:, None], tuple(state)


def _step(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, a: Tensor, b: Tensor, p: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v (B, D), decay, bonus (G, D), G a divisor of B, a, b, p (B, D) -> o, a, b, p."""
    B, D = k.shape
    k, v, decay, bonus, a, b, p = (rows(x) for x in (k, v, decay, bonus, a, b, p))
    o, next_a, next_b, next_p = v.new_empty(B, D), a.new_empty(B, D), a.new_empty(B, D), a.new_empty(B, D)
    config = configured("wkv.step", step_config, D)
    step_kernel[(B * triton.cdiv(D, config.block),)](
        k, v, decay, bonus, a, b, p, o, next_a, next_b, next_p, B // len(decay),
        *(x.stride(0) for x in (k, v, decay, bonus, a, b, p)),
        D=D, BLOCK=config.block, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return o, next_a, next_b, next_p


def _fake(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, a: Tensor, b: Tensor, p: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), a.new_empty(a.shape), b.new_empty(b.shape), p.new_empty(p.shape)


_op = step_op("wkv_step", _step, _fake)


def step_config(D: int) -> Config:
    return Config(1, min(triton.next_power_of_2(D), 64), 1, 1)


@kernel
def step_kernel(
    k, v, decay, bonus, a, b, p, o, next_a, next_b, next_p, per_group,
    k_stride, v_stride, decay_stride, bonus_stride, a_stride, b_stride, p_stride,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence and BLOCK channels."""
    wait_for_earlier()
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    sequence = tl.cast(tl.program_id(0) // blocks, tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    g = tl.load(decay + sequence // per_group * decay_stride + d, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(bonus + sequence // per_group * bonus_stride + d, mask=inside, other=0.0).to(tl.float32)
    b_k = tl.load(k + sequence * k_stride + d, mask=inside, other=0.0).to(tl.float32)
    b_v = tl.load(v + sequence * v_stride + d, mask=inside, other=0.0).to(tl.float32)
    b_a = tl.load(a + sequence * a_stride + d, mask=inside, other=0.0)
    b_b = tl.load(b + sequence * b_stride + d, mask=inside, other=0.0)
    b_p = tl.load(p + sequence * p_stride + d, mask=inside, other=0.0)
    past, now, kept, added, top = weights(b_p, b_k, g, u)
    to = sequence * D + d
    b_o = (past * b_a + now * b_v) / (past * b_b + now)
    tl.store(o + to, b_o.to(o.dtype.element_ty), mask=inside)
    tl.store(next_a + to, kept * b_a + added * b_v, mask=inside)
    tl.store(next_b + to, kept * b_b + added, mask=inside)
    tl.store(next_p + to, top, mask=inside)
