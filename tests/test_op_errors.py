"""The measure that fused ops are judged by: what rounding costs passes, what is wrong does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.testing.ops import check_op, op_errors

TOLERANCE = 1e-2


def heavy(x: Tensor) -> Tensor:
    """A few elements hundreds of times as large as the rest, as the first tokens' gradients of an average are."""
    return x * torch.where(torch.arange(x.numel()) % 5000 == 0, 300.0, 1.0).to(x).view_as(x)


def arguments() -> dict[str, Tensor]:
    return {"x": torch.randn(100, 500, generator=torch.Generator().manual_seed(0))}


def test_the_exact_result_rounded_to_bf16_passes() -> None:
    check_op(heavy, lambda x: heavy(x.double()).bfloat16(), arguments(), TOLERANCE)


@pytest.mark.parametrize("row", [0, 37])
def test_a_row_that_is_wrong_does_not(row: int) -> None:
    def wrong(x: Tensor) -> Tensor:
        y = heavy(x)
        return torch.cat([y[:row], 2 * y[row : row + 1] + 100, y[row + 1 :]])

    assert op_errors(heavy, wrong, arguments())["output"] > TOLERANCE


def test_a_large_element_that_is_off_by_more_than_rounding_does_not() -> None:
    def off(x: Tensor) -> Tensor:
        y = heavy(x)
        return torch.where(y.abs() == y.abs().max(), 1.02 * y, y)

    assert op_errors(heavy, off, arguments())["output"] > TOLERANCE
