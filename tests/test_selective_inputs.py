"""selective_inputs: both products and torch's own layers against the definition, with x used on beside them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.selective_inputs import selective_inputs
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["linear"][torch.float32]


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("T", "D", "R", "N"), [(1, 1, 1, 1), (33, 17, 8, 16), (20, 40, 3, 5), (9, 20, 2, 80)])
def test_outputs_and_gradients(impl: str, T: int, D: int, R: int, N: int) -> None:
    a = inputs(T, {"x": "BTD", "weight": "MD", "dt_weight": "DR"}, B=2, D=D, R=R, M=R + 2 * N)
    check_op(partial(selective_inputs, impl="reference"), partial(selective_inputs, impl=impl), a, FP32)


@pytest.mark.parametrize("N", [3, 70])
def test_a_pack_is_one_call(N: int) -> None:
    pytest.importorskip("triton")
    a = inputs(9, {"x": "PBTD", "weight": "PMD", "dt_weight": "PDR"}, P=3, B=2, D=20, R=2, M=2 + 2 * N)

    def each(x: Tensor, weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, ...]:
        results = [selective_inputs(*row, impl="reference") for row in zip(x, weight, dt_weight, strict=True)]
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    def pack(x: Tensor, weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.vmap(partial(selective_inputs, impl="triton"))(x, weight, dt_weight))

    check_op(each, pack, a, FP32)


def test_what_does_not_fit() -> None:
    with pytest.raises(UnsupportedError, match="dt_weight has shape"):
        selective_inputs(torch.rand(2, 3, 4), torch.rand(6, 4), torch.rand(5, 2))
    with pytest.raises(UnsupportedError, match="weight has 5 rows"):
        selective_inputs(torch.rand(2, 3, 4), torch.rand(5, 4), torch.rand(4, 2))


@pytest.mark.parametrize("used", range(4))
def test_what_is_not_used_has_no_gradient(used: int) -> None:
    a = inputs(5, {"x": "BTD", "weight": "MD", "dt_weight": "DR"}, B=2, D=6, R=2, M=8)
    a["dt_weight"].requires_grad_(used == 1)
    a["weight"].requires_grad_(used > 0)

    def one(impl: str, **b: Tensor) -> Tensor:
        return selective_inputs(**b, impl=impl)[used]

    check_op(partial(one, "reference"), partial(one, "triton"), a, FP32)
