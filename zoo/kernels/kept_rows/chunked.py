"""Lookups."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.gather_rows import gather_rows


def kept_rows(positions: Tensor, xs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return xs, [gather_rows(x, positions, impl="chunked") for x in xs]
