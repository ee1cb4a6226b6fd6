"""projections: torch's layers and the op for packs against the definition, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.projections import projections
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["projections"][torch.float32]
SHAPES = {"x": "BTK", "first": "IK", "second": "JK"}


def two(x: Tensor, first: Tensor, second: Tensor, impl: str) -> tuple[Tensor, ...]:
    return projections(x, first, second, impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("K", "I", "J"), [(18, 7, 1), (18, 16, 20), (18, 32, 48), (130, 7, 20)])
def test_outputs_and_gradients(impl: str, K: int, I: int, J: int) -> None:  # noqa: E741
    a = inputs(9, SHAPES, B=2, K=K, I=I, J=J)
    check_op(*(partial(two, impl=i) for i in ("reference", impl)), a, FP32)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("K", [18, 300])
def test_biases(impl: str, K: int) -> None:
    a = inputs(9, {"x": "TK", "weight": "NK", "bias": "N"}, K=K, N=20)

    def op(x: Tensor, weight: Tensor, bias: Tensor, impl: str) -> tuple[Tensor, ...]:
        return projections(x, *weight.split([16, 4]), biases=bias.split([16, 4]), impl=impl)

    check_op(*(partial(op, impl=i) for i in ("reference", impl)), a, FP32)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_one_result_without_a_gradient(impl: str) -> None:
    a = inputs(9, {"x": "TK", "weight": "NK"}, K=18, N=20)
    op = lambda x, weight, impl: projections(x, *weight.split([8, 8, 4]), impl=impl)[1]  # noqa: E731
    check_op(*(partial(op, impl=i) for i in ("reference", impl)), a, FP32)


def test_a_pack_is_one_call_with_weights_of_their_own() -> None:
    pytest.importorskip("triton")
    a = inputs(7, {"x": "PBTK", "first": "PIK", "second": "PJK"}, P=3, B=2, K=10, I=4, J=5)

    def loop(**b: Tensor) -> tuple[Tensor, ...]:
        each = [two(*row, impl="reference") for row in zip(*b.values(), strict=True)]
        return tuple(torch.stack(column) for column in zip(*each, strict=True))

    pack = lambda **b: torch.func.vmap(partial(two, impl="triton"))(*b.values())  # noqa: E731
    check_op(loop, pack, a, FP32)


def test_dtypes_and_what_does_not_fit() -> None:
    a = inputs(4, SHAPES, B=1, K=8, I=2, J=4)
    for impl in ("reference", "chunked", "triton"):
        with torch.autocast("cpu", torch.bfloat16):
            y = two(**a, impl=impl)
        assert [part.dtype for part in y] == [torch.bfloat16] * 2
        loss = torch.stack([part.float().sum() for part in y]).sum()
        assert torch.autograd.grad(loss, a["second"])[0].dtype == torch.float32
    with pytest.raises(UnsupportedError, match=r"a weight has shape \(2, 3\); expected \(N, K=8\)"):
        projections(a["x"], a["first"][:, :3])
    with pytest.raises(UnsupportedError, match=r"biases have shapes \[\(3,\)\]"):
        projections(a["x"], a["first"], biases=[torch.rand(3)])
