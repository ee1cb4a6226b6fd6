"""gather_rows: a lookup and its gradient, with positions asked twice, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.gather_rows import gather_rows
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["gather_rows"][torch.float32]


def asked(*shape: int, T: int) -> Tensor:
    return torch.randint(T, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("T", "Q", "D"), [(1, 1, 1), (9, 20, 17), (70, 35, 130)])
def test_rows_and_gradients(impl: str, T: int, Q: int, D: int) -> None:
    op = partial(gather_rows, positions=asked(2, Q, T=T))
    a = inputs(T, {"x": "BTD"}, B=2, D=D)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, FP32)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_rows_each_asked_once_of_a_part_of_the_channels(impl: str) -> None:
    positions = torch.stack([torch.randperm(70, generator=torch.Generator().manual_seed(b))[:40] for b in range(2)])

    def op(x: Tensor, impl: str) -> Tensor:
        return gather_rows(x[..., 3:20], positions, impl=impl)

    a = inputs(70, {"x": "BTD"}, B=2, D=33)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, FP32)


def test_a_pack_is_one_call() -> None:
    pytest.importorskip("triton")
    positions = asked(3, 2, 5, T=9)
    a = inputs(9, {"x": "PBTD"}, P=3, B=2, D=8)

    def each(x: Tensor) -> Tensor:
        return torch.stack([gather_rows(*row, impl="reference") for row in zip(x, positions, strict=True)])

    def pack(x: Tensor) -> Tensor:
        return torch.func.vmap(partial(gather_rows, impl="triton"))(x, positions)

    check_op(each, pack, a, FP32)


def test_what_does_not_fit() -> None:
    with pytest.raises(UnsupportedError, match="positions has shape"):
        gather_rows(torch.rand(2, 3, 4), asked(3, 1, T=3))
