"""shifted_projections: the shift and layers, and the fused kernels, against the definition, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.shifted_projections import shifted_projections
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["shifted_projections"][torch.float32]
SHAPES = {"x": "BTK", "shares": "nK", "weight": "NK"}


def two(x, shares, weight, previous=None, *, impl):
    return shifted_projections(x, shares, *weight.split([16, 5]), previous=previous, impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("previous", [{}, {"previous": "BK"}])
@pytest.mark.parametrize(("T", "K"), [(1, 16), (9, 20), (6, 136)])
def test_outputs_and_gradients(impl: str, previous: dict[str, str], T: int, K: int) -> None:
    a = inputs(T, SHAPES | previous, B=2, K=K, n=2, N=21)
    check_op(*(partial(two, impl=i) for i in ("reference", impl)), a, FP32)


def test_several_blocks_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("zoo.kernels.shifted_projections.triton")
    small = fused.Config(chunk=16, block=16, num_warps=4, num_stages=1)
    for rule in ("forward_config", "input_config", "weight_config"):
        monkeypatch.setattr(fused, rule, lambda x: small)
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    a = inputs(37, SHAPES, B=3, K=24, n=2, N=50)
    op = lambda x, shares, weight, impl: shifted_projections(x, shares, *weight.split([40, 10]), impl=impl)  # noqa: E731
    check_op(*(partial(op, impl=i) for i in ("reference", "triton")), a, FP32)


def test_a_pack_is_one_call_with_weights_of_their_own() -> None:
    pytest.importorskip("triton")
    a = inputs(5, {"x": "PBTK", "shares": "PnK", "weight": "PNK"}, P=3, B=2, K=8, n=2, N=21)

    def loop(**b):
        results = [two(*row, impl="reference") for row in zip(*b.values(), strict=True)]
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    pack = lambda **b: torch.func.vmap(partial(two, impl="triton"))(*b.values())  # noqa: E731
    check_op(loop, pack, a, FP32)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_one_product_without_a_gradient(impl: str) -> None:
    a = inputs(4, SHAPES, B=1, K=8, n=2, N=21)
    op = lambda impl, **b: two(**b, impl=impl)[1]  # noqa: E731
    check_op(*(partial(op, i) for i in ("reference", impl)), a, FP32)


def test_dtypes_and_what_does_not_fit() -> None:
    a = {name: t.detach() for name, t in inputs(4, SHAPES, B=1, K=8, n=2, N=21).items()}
    for impl in ("reference", "chunked", "triton"):
        assert {y.dtype for y in two(a["x"].bfloat16(), a["shares"], a["weight"], impl=impl)} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert {y.dtype for y in two(**a, impl=None)} == {torch.bfloat16}
    with pytest.raises(UnsupportedError, match=r"weights have shapes \[\(21, 8\)\]"):
        shifted_projections(a["x"], a["shares"], a["weight"])
    with pytest.raises(UnsupportedError, match="shares has shape"):
        shifted_projections(a["x"], a["shares"][:, :3], *a["weight"].split([16, 5]))
