"""mingru_inputs: torch's functions and the fused kernels against the definition, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.mingru import mingru_inputs
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["mingru"][torch.float32]
SHAPES = {"candidate": "BTD", "gate": "BTD"}


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("T", "D"), [(9, 3), (70, 20)])
def test_outputs_and_gradients(impl: str, T: int, D: int) -> None:
    a = inputs(T, SHAPES, seed=1, B=2, D=D)
    check_op(*(partial(mingru_inputs, impl=i) for i in ("reference", impl)), a, FP32)


def test_gates_far_from_zero() -> None:
    pytest.importorskip("triton")
    gate = torch.tensor([-200.0, -60.0, -20.0, -9.0, -3.0, -2.9, 0.0, 4.0, 17.0, 60.0])[None, :, None]
    a = {"candidate": torch.ones_like(gate).requires_grad_(), "gate": gate.requires_grad_()}
    check_op(*(partial(mingru_inputs, impl=i) for i in ("reference", "triton")), a, FP32)
    got, want = (mingru_inputs(**a, impl=i)[1].double() for i in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_slices_as_a_pack() -> None:
    pytest.importorskip("triton")

    def op(projected: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        gate, candidate = projected.chunk(2, dim=-1)
        return mingru_inputs(candidate, gate, impl=impl)

    a = inputs(5, {"projected": "PBTD"}, P=3, B=2, D=16)
    loop = lambda projected: tuple(torch.stack(y) for y in zip(*(op(p, "reference") for p in projected), strict=True))  # noqa: E731
    check_op(loop, lambda projected: torch.func.vmap(partial(op, impl="triton"))(projected), a, FP32)


def test_dtypes_and_what_does_not_fit() -> None:
    a = {name: t.detach().bfloat16() for name, t in inputs(4, SHAPES, B=1, D=8).items()}
    for impl in ("reference", "chunked", "triton"):
        assert [y.dtype for y in mingru_inputs(**a, impl=impl)] == [torch.bfloat16, torch.float32]
    with pytest.raises(UnsupportedError, match="gate has shape"):
        mingru_inputs(a["candidate"], a["gate"][:, :3])
