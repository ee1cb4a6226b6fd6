"""Sums of the parts of a gradient that programs leave behind, in one order: two runs give the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that a program has on their way at a time.
LOADED = 4096


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts (groups, number, ...) in fp32 -> (groups, ...) in `dtype`: the sum over `number`, in fp32."""
    groups, number, *shape = parts.shape
    if number == 1:
        return parts.squeeze(1).to(dtype)
    sums = torch.empty(groups, *shape, dtype=dtype, device=parts.device)
    size = sums[0].numel()
    rows = min(triton.next_power_of_2(number), LOADED // 16)
    columns = LOADED // rows
    sum_kernel[(groups * triton.cdiv(size, columns),)](parts, sums, number, size, ROWS=rows, COLUMNS=columns)
    return sums


@triton.jit
def sum_kernel(parts, sums, number, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program a group and COLUMNS sums."""
    blocks = tl.cdiv(size, COLUMNS)
    group = tl.cast(tl.program_id(0) // blocks, tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    row = tl.arange(0, ROWS)[:, None]
    at = parts + (group * number + row) * size + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, number, ROWS):
        total += tl.load(at + tl.cast(start, tl.int64) * size, mask=(start + row < number) & inside[None, :], other=0.0)
    tl.store(sums + group * size + column, tl.sum(total, 0).to(sums.dtype.element_ty), mask=inside)
