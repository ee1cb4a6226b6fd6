"""joined_rows: a lookup and its gradient, with positions asked twice, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.joined_rows import joined_rows
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["joined_rows"][torch.float32]


def asked(*shape: int, T: int) -> torch.Tensor:
    return torch.randint(T, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("T", "Q", "D"), [(1, 1, 1), (9, 20, 17), (70, 35, 130)])
def test_rows_and_gradients(impl: str, T: int, Q: int, D: int) -> None:
    op = partial(joined_rows, positions=asked(2, Q, T=T))
    a = inputs(T, {"x": "BTD", "branch": "BTD"}, B=2, D=D)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, FP32)
    op = partial(op, branch=None)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), {"x": a["x"]}, FP32)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_rows_each_asked_once_of_a_part_of_the_channels(impl: str) -> None:
    positions = torch.stack([torch.randperm(70, generator=torch.Generator().manual_seed(b))[:40] for b in range(2)])

    def op(x: torch.Tensor, branch: torch.Tensor, impl: str) -> torch.Tensor:
        return joined_rows(x[..., 3:20], branch[..., :17], positions, impl=impl)

    a = inputs(70, {"x": "BTD", "branch": "BTD"}, B=2, D=33)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, FP32)


def test_a_pack_is_one_call() -> None:
    pytest.importorskip("triton")
    positions = asked(3, 2, 5, T=9)
    a = inputs(9, {"x": "PBTD", "branch": "PBTD"}, P=3, B=2, D=8)

    def each(x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        rows = zip(x, branch, positions, strict=True)
        return torch.stack([joined_rows(*row, impl="reference") for row in rows])

    def pack(x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(partial(joined_rows, impl="triton"))(x, branch, positions)

    check_op(each, pack, a, FP32)


def test_what_does_not_fit() -> None:
    with pytest.raises(UnsupportedError, match="branch has shape"):
        joined_rows(torch.rand(2, 3, 4), torch.rand(2, 4, 4), asked(2, 1, T=3))
