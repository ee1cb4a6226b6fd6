"""ssm_kernel: taps and gradients of both backends against the definition, alone and as a pack."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.ssm_kernel import ssm_kernel
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["ssm_kernel"][torch.float32]


def parameters(*systems: int, N: int, seed: int = 0) -> dict[str, Tensor]:
    """As S4D-Lin starts, with some noise: steps from 0.001 to 0.1."""
    draw = torch.Generator().manual_seed(seed)
    noise = partial(torch.randn, generator=draw)
    a = {
        "log_dt": math.log(1e-3) + torch.rand(systems, generator=draw) * math.log(100),
        "log_A_real": math.log(0.5) + 0.1 * noise(*systems, N),
        "A_imag": math.pi * torch.arange(N) + 0.1 * noise(*systems, N),
        "C": noise(*systems, N, 2),
    }
    return {name: x.requires_grad_() for name, x in a.items()}


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("H", "N", "length"), [(1, 1, 1), (3, 5, 17), (2, 16, 130)])
def test_taps_and_gradients(impl: str, H: int, N: int, length: int) -> None:
    op = partial(ssm_kernel, length=length)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), parameters(H, N=N), FP32)


def test_a_pack_is_one_call() -> None:
    pytest.importorskip("triton")

    def loop(**a: Tensor) -> Tensor:
        return torch.stack([ssm_kernel(*row, 9, impl="reference") for row in zip(*a.values(), strict=True)])

    def pack(**a: Tensor) -> Tensor:
        return torch.func.vmap(lambda *row: ssm_kernel(*row, 9, impl="triton"))(*a.values())

    check_op(loop, pack, parameters(3, 2, N=4), FP32)


def test_what_does_not_fit() -> None:
    a = parameters(2, N=3)
    with pytest.raises(UnsupportedError, match="A_imag has shape"):
        ssm_kernel(**a | {"A_imag": a["A_imag"][:1]}, length=4)
    with pytest.raises(UnsupportedError, match="length is 0"):
        ssm_kernel(**a, length=0)
