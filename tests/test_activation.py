"""activation: torch's functions and the fused kernels against the definitions, alone and as a pack."""

from __future__ import annotations

from functools import partial
from typing import get_args

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.activation import Kind, activation
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["activation"][torch.float32]
SHAPES = {"x": "BTD", "bias": "D"}


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(("T", "D"), [(9, 3), (17, 20)])
def test_outputs_and_gradients(impl: str, kind: Kind, T: int, D: int) -> None:
    op = partial(activation, kind=kind, scale=-0.5)
    check_op(*(partial(op, impl=i) for i in ("reference", impl)), inputs(T, SHAPES, B=2, D=D), FP32)


@pytest.mark.parametrize("kind", ["softplus", "logsigmoid"])
def test_exact_far_from_zero(kind: Kind) -> None:
    pytest.importorskip("triton")
    x = torch.tensor([-80.0, -20.0, -9.0, -1e-3, 0.0, 4.0, 16.0, 17.0, 60.0])[None, :, None]
    want = activation(x.double(), torch.zeros(1), kind, impl="reference")
    got = activation(x, torch.zeros(1), kind, impl="triton")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_several_blocks_and_programs_of_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("zoo.kernels.activation.triton")
    monkeypatch.setattr(fused, "config_of", lambda x: fused.Config(chunk=1, block=64, num_warps=4, num_stages=1))
    monkeypatch.setattr(fused, "PROGRAMS", 6)
    monkeypatch.setattr(fused, "SUMMING_PROGRAMS", 3)
    op = lambda x, bias, impl: activation(x[..., 5:21], bias[5:21], "softplus", impl=impl)  # noqa: E731
    check_op(*(partial(op, impl=i) for i in ("reference", "triton")), inputs(29, SHAPES, B=2, D=24), FP32)


def test_a_pack_is_one_call_with_biases_of_their_own() -> None:
    pytest.importorskip("triton")
    a = inputs(5, {"x": "PBTD", "bias": "PD"}, P=3, B=2, D=8)
    op = partial(activation, kind="sigmoid")
    loop = lambda **b: torch.stack([op(*row, impl="reference") for row in zip(*b.values(), strict=True)])  # noqa: E731
    pack = lambda **b: torch.func.vmap(partial(op, impl="triton"))(*b.values())  # noqa: E731
    check_op(loop, pack, a, FP32)


def test_dtypes_and_what_does_not_fit() -> None:
    a = {name: t.detach() for name, t in inputs(4, SHAPES, B=1, D=8).items()}
    for impl in ("reference", "chunked", "triton"):
        assert activation(a["x"].bfloat16(), a["bias"], "exp", impl=impl).dtype == torch.float32
    with pytest.raises(UnsupportedError, match="bias has shape"):
        activation(a["x"], a["bias"][:3], "exp")
    with pytest.raises(UnsupportedError, match="kind 'tanh' is unknown; use one of softplus, logsigmoid, sigmoid, exp"):
        activation(a["x"], a["bias"], "tanh")  # type: ignore[arg-type]
