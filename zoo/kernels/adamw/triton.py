"""One launch for a stack: 16 bytes read and 12 written a parameter, and nothing else."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.launch import check_launch

BLOCK = 1024


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rates: Tensor,
    decays: Tensor,
    unbias: Tensor,
    scale: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    check_launch("adamw", parameter)
    size = parameter[0].numel()
    blocks = triton.cdiv(size, BLOCK)
    adamw_kernel[(len(parameter) * blocks,)](
        parameter, gradient.contiguous(), mean, square, rates, decays, unbias, rates if scale is None else scale,
        size, blocks, *betas, eps, SCALE=scale is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def adamw_kernel(
    parameter, gradient, mean, square, rates, decays, unbias, scales, size, blocks, beta1, beta2, eps,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(0) // blocks
    within = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = within < size
    at = member.to(tl.int64) * size + within
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        g *= tl.load(scales + member)
    m = beta1 * tl.load(mean + at, mask=mask, other=0.0) + (1 - beta1) * g
    v = beta2 * tl.load(square + at, mask=mask, other=0.0) + (1 - beta2) * g * g
    tl.store(mean + at, m, mask=mask)
    tl.store(square + at, v, mask=mask)
    rate = tl.load(rates + member)
    root = tl.sqrt(v * tl.load(unbias + 1))
    p = tl.load(parameter + at, mask=mask, other=0.0) * (1 - rate * tl.load(decays + member))
    tl.store(parameter + at, p - rate * m * tl.load(unbias) / (root + eps), mask=mask)
