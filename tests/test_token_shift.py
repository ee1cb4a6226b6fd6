"""token_shift: the parallel form and the fused kernels against the definition, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.token_shift import token_shift
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["token_shift"][torch.float32]
SHAPES = {"x": "BTD", "weight": "ND"}
OPTIONAL = {"offset": "NBTD", "previous": "BD"}


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("optional", [{}, OPTIONAL])
@pytest.mark.parametrize(("T", "D", "N"), [(1, 16, 1), (9, 20, 3)])
def test_outputs_and_gradients(impl: str, optional: dict[str, str], T: int, D: int, N: int) -> None:
    a = inputs(T, SHAPES | optional, B=2, D=D, N=N)
    check_op(*(partial(token_shift, impl=i) for i in ("reference", impl)), a, FP32)


def test_several_blocks_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("zoo.kernels.token_shift.triton")
    small = fused.Config(chunk=1, block=64, num_warps=4, num_stages=1)
    monkeypatch.setattr(fused, "config_of", lambda x: small)
    monkeypatch.setattr(fused, "backward_config", lambda x: small)
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    monkeypatch.setattr(fused, "SUMMING_PROGRAMS", 3)
    a = inputs(13, SHAPES | OPTIONAL, B=2, D=16, N=2)
    check_op(*(partial(token_shift, impl=i) for i in ("reference", "triton")), a, FP32)


def test_a_pack_is_one_call_with_weights_of_their_own() -> None:
    pytest.importorskip("triton")
    a = inputs(5, {"x": "PBTD", "weight": "PND", "offset": "PNBTD"}, P=3, B=2, D=8, N=2)
    loop = lambda **b: tuple(  # noqa: E731
        torch.stack(y)
        for y in zip(*(token_shift(*row, impl="reference") for row in zip(*b.values(), strict=True)), strict=True)
    )
    pack = lambda **b: torch.func.vmap(partial(token_shift, impl="triton"))(*b.values())  # noqa: E731
    check_op(loop, pack, a, FP32)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_one_mixture_without_a_gradient(impl: str) -> None:
    a = inputs(4, SHAPES, B=1, D=8, N=3)
    op = lambda impl, **b: token_shift(**b, impl=impl)[1]  # noqa: E731
    check_op(*(partial(op, i) for i in ("reference", impl)), a, FP32)


def test_dtypes_and_what_does_not_fit() -> None:
    a = {name: t.detach() for name, t in inputs(4, SHAPES, B=1, D=8, N=2).items()}
    for impl in ("reference", "chunked", "triton"):
        assert {y.dtype for y in token_shift(a["x"].bfloat16(), a["weight"], impl=impl)} == {torch.bfloat16}
    with pytest.raises(UnsupportedError, match="weight has shape"):
        token_shift(a["x"], a["weight"][:, :3])
