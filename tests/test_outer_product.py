"""outer_product and read_product: torch's and the fused kernels against the definitions, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.outer_product import outer_product, read_product
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["outer_product"][torch.float32]
OPS = [(outer_product, {"k": "BTIH", "v": "BTJH"}), (read_product, {"q": "BTIH", "s": "BTIJH"})]


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("op", "shapes"), OPS)
@pytest.mark.parametrize(("T", "I", "J", "H"), [(9, 1, 1, 16), (17, 3, 2, 20)])
def test_outputs_and_gradients(impl: str, op, shapes: dict[str, str], T: int, I: int, J: int, H: int) -> None:  # noqa: E741
    a = inputs(T, shapes, seed=1, B=2, I=I, J=J, H=H)
    check_op(*(partial(op, impl=i) for i in ("reference", impl)), a, FP32)


def test_slices_as_a_pack() -> None:
    pytest.importorskip("triton")

    def op(qkv: torch.Tensor, impl: str) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (2, 4)) for x in qkv.chunk(3, dim=-1))
        return read_product(q, outer_product(k, v, impl=impl), impl=impl)

    a = inputs(5, {"qkv": "PBTD"}, P=3, B=2, D=24)
    loop = lambda qkv: torch.stack([op(member, "reference") for member in qkv])  # noqa: E731
    check_op(loop, lambda qkv: torch.func.vmap(partial(op, impl="triton"))(qkv), a, FP32)


@pytest.mark.parametrize(("op", "shapes"), OPS)
def test_dtypes_and_what_does_not_fit(op, shapes: dict[str, str]) -> None:
    a = {name: t.detach().bfloat16() for name, t in inputs(4, shapes, B=1, I=2, J=2, H=8).items()}
    first, second = a
    for impl in ("reference", "chunked", "triton"):
        assert op(a[first], a[second].float(), impl=impl).dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match=f"{second} has shape"):
        op(a[first], a[second][:, :3])
