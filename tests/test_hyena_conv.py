"""hyena_conv: torch's and the fused kernels against the definition, alone and as a pack."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.hyena_conv import hyena_conv
from zoo.kernels.launch import Config
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["hyena_conv"][torch.float32]
SHAPES = {"x1": "BTD", "x2": "BTD", "v": "BTD", "weight": "GDW", "bias": "GD", "kernel": "DL", "skip": "D"}


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("T", "D", "W", "L"), [(1, 4, 1, 1), (2, 17, 4, 5), (64, 3, 3, 64), (70, 5, 2, 9)])
def test_outputs_and_gradients(impl: str, T: int, D: int, W: int, L: int) -> None:
    a = inputs(T, SHAPES, seed=1, B=2, G=3, D=D, W=W, L=L)
    check_op(*(partial(hyena_conv, impl=i) for i in ("reference", impl)), a, FP32)


@pytest.mark.parametrize("longest", [4096, 4], ids=["direct", "fourier"])
def test_slices_as_a_pack(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("zoo.kernels.long_conv.triton"), "LONGEST", longest)
    fused = importlib.import_module("zoo.kernels.hyena_conv.triton")
    monkeypatch.setattr(fused, "config_of", lambda v: Config(16, 16, 1, 1))
    monkeypatch.setattr(fused, "walk_config", lambda v: Config(8, 8, 1, 1))

    def op(impl: str, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return hyena_conv(*x.chunk(3, dim=-1), *rest, impl=impl)

    shapes = {"x": "PBTC"} | {name: "P" + SHAPES[name] for name in ("weight", "bias", "kernel", "skip")}
    a = inputs(19, shapes, P=3, B=2, C=15, G=3, D=5, W=3, L=19)

    def loop(**pack: torch.Tensor) -> torch.Tensor:
        return torch.stack([op("reference", *member) for member in zip(*pack.values(), strict=True)])

    check_op(loop, lambda **pack: torch.func.vmap(partial(op, "triton"))(*pack.values()), a, FP32)


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_dtypes_and_what_does_not_fit(impl: str) -> None:
    a = {name: t.detach() for name, t in inputs(4, SHAPES, B=1, G=3, D=8, W=3, L=4).items()}
    a |= {name: a[name].bfloat16() for name in ("x1", "x2", "v")}
    assert hyena_conv(**a, impl=impl).dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="v has shape"):
        hyena_conv(**a | {"v": a["v"][:, :3]}, impl=impl)
    with pytest.raises(UnsupportedError, match=r"weight must be \(3, D, W\)"):
        hyena_conv(**a | {"weight": a["weight"][:2], "bias": a["bias"][:2]}, impl=impl)
