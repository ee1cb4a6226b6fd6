"""linear: torch's and the fused layer against the definition, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.linear import linear
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["linear"][torch.float32]


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "K", "N"), [(1, 1, 1), (33, 17, 40), (130, 70, 33)])
def test_outputs_and_gradients(impl: str, bias: bool, rows: int, K: int, N: int) -> None:
    a = inputs(rows, {"x": "TK", "weight": "NK", **({"bias": "N"} if bias else {})}, K=K, N=N)
    check_op(partial(linear, impl="reference"), partial(linear, impl=impl), a, FP32)


@pytest.mark.parametrize("bias", [False, True])
def test_a_pack_has_matrices_of_its_own(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("zoo.kernels.linear.triton")
    monkeypatch.setattr(fused, "PROGRAMS", 7)
    a = inputs(40, {"x": "PBTK", "weight": "PNK", **({"bias": "PN"} if bias else {})}, P=3, B=2, K=20, N=6)

    def each(**b: torch.Tensor) -> torch.Tensor:
        return torch.stack([linear(*rows, impl="reference") for rows in zip(*b.values(), strict=True)])

    def pack(**b: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(partial(linear, impl="triton"))(*b.values())

    check_op(each, pack, a, FP32)


def test_rows_of_a_wider_tensor_are_not_copied() -> None:
    a = inputs(21, {"whole": "BTK", "weight": "NK", "bias": "N"}, B=2, K=40, N=5)

    def slices(whole: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, impl: str) -> torch.Tensor:
        return linear(whole[..., 8:24], weight[:, :16], bias, impl=impl)

    check_op(partial(slices, impl="reference"), partial(slices, impl="triton"), a, FP32)


def test_what_does_not_fit() -> None:
    with pytest.raises(UnsupportedError, match="weight has shape"):
        linear(torch.rand(3, 4), torch.rand(5, 6))
