"""implicit_filter: taps and gradients of both backends against the definition, alone and as a pack."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.implicit_filter import implicit_filter
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["implicit_filter"][torch.float32]
SHAPES = {
    "weight_1": "NF", "bias_1": "N", "weight_2": "NN", "bias_2": "N", "weight_3": "NN", "bias_3": "N",
    "frequency": "N", "out_weight": "DN",
}  # fmt: skip


def case(L: int, F: int, N: int, D: int, pack: str = "", **sizes: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """positions and window, which have no gradient, and the parameters."""
    shapes = {"positions": "LF", "window": "LD"} | SHAPES
    a = inputs(L, {name: pack + letters for name, letters in shapes.items()}, L=L, F=F, N=N, D=D, **sizes)
    a = {name: (x.detach() * N**-0.5 if "weight" in name else x.detach()).requires_grad_() for name, x in a.items()}
    return {name: a.pop(name).detach() for name in ("positions", "window")}, a


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("L", "F", "N", "D", "length"), [(1, 1, 1, 1, 1), (40, 3, 17, 5, 33), (64, 5, 16, 70, 64)])
def test_taps_and_gradients(impl: str, L: int, F: int, N: int, D: int, length: int) -> None:
    constants, a = case(L, F, N, D)
    op = partial(implicit_filter, **constants, length=length)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, FP32)


def test_a_pack_is_one_call() -> None:
    pytest.importorskip("triton")
    constants, a = case(20, 3, 16, 4, "P", P=3)

    def loop(**a: Tensor) -> Tensor:
        rows = [dict(zip(a, row, strict=True)) for row in zip(*a.values(), strict=True)]
        return torch.stack(
            [
                implicit_filter(**{name: x[i] for name, x in constants.items()}, **row, length=18, impl="reference")
                for i, row in enumerate(rows)
            ]
        )

    def pack(**a: Tensor) -> Tensor:
        def one(b: dict[str, Any]) -> Tensor:
            return implicit_filter(**b, length=18, impl="triton")

        return torch.func.vmap(one)(constants | a)

    check_op(loop, pack, a, FP32)


def test_what_does_not_fit() -> None:
    constants, a = case(4, 3, 130, 2)
    with pytest.raises(UnsupportedError, match="up to 128 hidden units, not 130"):
        implicit_filter(**constants, **a, length=4, impl="triton")
    with pytest.raises(UnsupportedError, match="window has shape"):
        implicit_filter(constants["positions"], constants["window"][:3], **a, length=4)
