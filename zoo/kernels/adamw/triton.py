"""One launch for all stacks: 16 bytes read and 12 written a parameter, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.launch import check_launch

BLOCK, STEPS = 1024, 2


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    decayed: Sequence[bool],
    rates: Tensor,
    decays: Tensor,
    remaining: Tensor,
    scale: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    check_launch("adamw", *parameters)
    members, sizes = len(rates), tuple(p[0].numel() for p in parameters)
    stacks = tuple(map(tuple, (parameters, [g.contiguous() for g in gradients], means, squares)))
    aligned = all(x.data_ptr() % 16 == 0 and x[0].numel() % 4 == 0 for stack in stacks for x in stack)
    adamw_kernel[(members * sum(triton.cdiv(size, BLOCK * STEPS) for size in sizes),)](
        *stacks, sizes, tuple(map(int, decayed)),
        rates, decays, remaining, rates if scale is None else scale, members, *betas, eps,
        N=len(sizes), SCALE=scale is not None, BLOCK=BLOCK, STEPS=STEPS, ALIGNED=aligned, num_warps=4,
    )  # fmt: skip


@kernel
def adamw_kernel(
    parameters, gradients, means, squares, sizes, decayed, rates, decays, remaining, scales, members, beta1, beta2, eps,
    N: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program a stack, member and STEPS times BLOCK parameters, which take longer than to find the stack."""
    wait_for_earlier()
    # Addresses as numbers, of the stack that this program's number falls into.
    program, size, has_decay = tl.program_id(0), 0, 0
    nowhere = tl.cast(0, tl.int64)
    parameter, gradient, mean, square = nowhere, nowhere, nowhere, nowhere
    within = program
    for i in tl.static_range(N):
        programs = members * tl.cdiv(sizes[i], BLOCK * STEPS)
        here = (program >= 0) & (program < programs)
        within = tl.where(here, program, within)
        size, has_decay = tl.where(here, sizes[i], size), tl.where(here, decayed[i], has_decay)
        parameter = tl.where(here, parameters[i].to(tl.int64), parameter)
        gradient = tl.where(here, gradients[i].to(tl.int64), gradient)
        mean = tl.where(here, means[i].to(tl.int64), mean)
        square = tl.where(here, squares[i].to(tl.int64), square)
        program -= programs
    blocks = tl.cdiv(size, BLOCK * STEPS)
    member = within // blocks
    fp32: tl.constexpr = tl.pointer_type(tl.float32)
    parameter, gradient, mean, square = parameter.to(fp32), gradient.to(fp32), mean.to(fp32), square.to(fp32)
    if ALIGNED:
        # What the compiler no longer sees: four numbers can be one load.
        size = size // 4 * 4
        parameter, gradient = tl.multiple_of(parameter, 16), tl.multiple_of(gradient, 16)
        mean, square = tl.multiple_of(mean, 16), tl.multiple_of(square, 16)
    rate = tl.load(rates + member)
    decay = tl.where(has_decay == 1, tl.load(decays + member), 0.0)
    size_of_step, inverse = rate / tl.load(remaining).to(tl.float32), 1 / tl.load(remaining + 1).to(tl.float32)
    for step in range(STEPS):
        column = (within % blocks * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        mask = column < size
        at = member.to(tl.int64) * size + column
        g = tl.load(gradient + at, mask=mask, other=0.0)
        if SCALE:
            g *= tl.load(scales + member)
        m = beta1 * tl.load(mean + at, mask=mask, other=0.0) + (1 - beta1) * g
        v = beta2 * tl.load(square + at, mask=mask, other=0.0) + (1 - beta2) * g * g
        p = tl.load(parameter + at, mask=mask, other=0.0) * (1 - rate * decay)
        tl.store(mean + at, m, mask=mask)
        tl.store(square + at, v, mask=mask)
        tl.store(parameter + at, p - size_of_step * m / (tl.sqrt(v * inverse) + eps), mask=mask)
