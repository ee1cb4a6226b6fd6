"""outer_conv: torch's and the fused kernels against the definition, alone and as a pack."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.outer_conv import outer_conv
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["outer_conv"][torch.float32]
SHAPES = {"q": "BTIH", "k": "BIHT", "v": "BTJH", "kernel": "HL", "skip": "H"}


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(
    ("T", "I", "J", "H", "L"),
    [(1, 1, 1, 4, 1), (9, 1, 1, 16, 12), (17, 3, 2, 5, 4), (70, 2, 2, 3, 70), (5, 2, 9, 3, 4)],
)
def test_outputs_and_gradients(impl: str, T: int, I: int, J: int, H: int, L: int) -> None:  # noqa: E741
    a = inputs(T, SHAPES, seed=1, B=2, I=I, J=J, H=H, L=L)
    check_op(*(partial(outer_conv, impl=i) for i in ("reference", impl)), a, FP32)


@pytest.mark.parametrize("longest", [4096, 4], ids=["direct", "fourier"])
def test_slices_as_a_pack(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("zoo.kernels.long_conv.triton"), "LONGEST", longest)

    def op(qkv: torch.Tensor, kernel: torch.Tensor, skip: torch.Tensor, impl: str) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (2, 4)) for x in qkv.chunk(3, dim=-1))
        return outer_conv(q, k.movedim(1, 3), v, kernel, skip, impl=impl)

    a = inputs(5, {"qkv": "PBTD", "kernel": "PHL", "skip": "PH"}, P=3, B=2, D=24, H=4, L=5)
    loop = lambda *pack: torch.stack([op(*member, "reference") for member in zip(*pack, strict=True)])  # noqa: E731
    together = lambda *pack: torch.func.vmap(partial(op, impl="triton"))(*pack)  # noqa: E731
    check_op(
        lambda qkv, kernel, skip: loop(qkv, kernel, skip),
        lambda qkv, kernel, skip: together(qkv, kernel, skip),
        a,
        FP32,
    )


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_dtypes_and_what_does_not_fit(impl: str) -> None:
    a = {name: t.detach() for name, t in inputs(4, SHAPES, B=1, I=2, J=2, H=8, L=4).items()}
    a |= {name: a[name].bfloat16() for name in ("q", "k", "v")}
    assert outer_conv(**a, impl=impl).dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="v has shape"):
        outer_conv(**a | {"v": a["v"][:, :3]}, impl=impl)
    with pytest.raises(UnsupportedError, match="no axis may be empty"):
        outer_conv(**a | {"kernel": a["kernel"][:, :0]}, impl=impl)
