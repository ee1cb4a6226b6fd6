"""Sums of the parts of a gradient that programs leave behind, in one order: two runs give the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.early import kernel, wait_for_earlier

# Numbers that a program has on their way at a time, and the most parts that these are of.
LOADED = 8192
MOST_PARTS = 1024


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts (groups, number, ...) in fp32 -> (groups, ...) in `dtype`: the sum over `number`, in fp32."""
    return sum_all([parts], dtype)[0]


def sum_all(parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As sum_parts, of several contiguous tensors in one launch."""
    if all(part.shape[1] == 1 for part in parts):
        return [part.squeeze(1).to(dtype) for part in parts]
    sums = [torch.empty(len(p), *p.shape[2:], dtype=dtype, device=p.device) for p in parts]
    numbers, sizes = tuple(p.shape[1] for p in parts), tuple(s[0].numel() for s in sums)
    rows = tuple(min(triton.next_power_of_2(number), MOST_PARTS) for number in numbers)
    groups = tuple(len(s) for s in sums)
    programs = sum(g * triton.cdiv(size, LOADED // r) for g, size, r in zip(groups, sizes, rows, strict=True))
    sum_kernel[(programs,)](tuple(parts), tuple(sums), groups, numbers, sizes, N=len(sums), ROWS=rows, LOADED=LOADED)
    return sums


@kernel
def sum_kernel(parts, sums, groups, numbers, sizes, N: tl.constexpr, ROWS: tl.constexpr, LOADED: tl.constexpr):
    """One program a tensor, group and LOADED / ROWS[i] sums, of ROWS[i] parts at a time."""
    wait_for_earlier()
    program = tl.program_id(0)
    for i in tl.static_range(N):
        programs = groups[i] * tl.cdiv(sizes[i], LOADED // ROWS[i])
        if (program >= 0) & (program < programs):
            _sum(parts[i], sums[i], program, numbers[i], sizes[i], ROWS[i], LOADED // ROWS[i])
        program -= programs


@triton.jit
def _sum(parts, sums, program, number, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    blocks = tl.cdiv(size, COLUMNS)
    group = tl.cast(program // blocks, tl.int64)
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    row = tl.arange(0, ROWS)[:, None]
    at = parts + (group * number + row) * size + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, number, ROWS):
        total += tl.load(at + tl.cast(start, tl.int64) * size, mask=(start + row < number) & inside[None, :], other=0.0)
    tl.store(sums + group * size + column, tl.sum(total, 0).to(sums.dtype.element_ty), mask=inside)
