"""kept_rows: lookups, and gradients added to those of the whole, with positions asked twice, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.kept_rows import kept_rows
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["gather_rows"][torch.float32]


def asked(*shape: int, T: int) -> Tensor:
    return torch.randint(T, shape, generator=torch.Generator().manual_seed(0))


def both(x: Tensor, z: Tensor, positions: Tensor, impl: str) -> tuple[Tensor, ...]:
    kept, rows = kept_rows(positions, x, z, impl=impl)
    return (*kept, *rows)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("T", "Q", "D"), [(1, 1, 1), (9, 20, 17), (70, 35, 130)])
def test_rows_and_gradients(impl: str, T: int, Q: int, D: int) -> None:
    op = partial(both, positions=asked(2, Q, T=T))
    a = inputs(T, {"x": "BTD", "z": "BTD"}, B=2, D=D)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, FP32)


def test_a_pack_is_one_call() -> None:
    pytest.importorskip("triton")
    positions = asked(3, 2, 5, T=9)
    a = inputs(9, {"x": "PBTD", "z": "PBTD"}, P=3, B=2, D=8)

    def each(x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        results = [both(*row, impl="reference") for row in zip(x, z, positions, strict=True)]
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    def pack(x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vmap(partial(both, impl="triton"))(x, z, positions)

    check_op(each, pack, a, FP32)


def test_what_does_not_fit() -> None:
    with pytest.raises(UnsupportedError, match="positions has shape"):
        kept_rows(asked(3, 4, T=2), torch.rand(2, 2, 8))
    with pytest.raises(UnsupportedError, match="expected one shape"):
        kept_rows(asked(2, 4, T=2), torch.rand(2, 2, 8), torch.rand(2, 2, 4))
