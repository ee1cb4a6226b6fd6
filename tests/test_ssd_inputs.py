"""ssd_inputs: the parallel form and the fused kernels against the definition, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.ssd_inputs import ssd_inputs
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["ssd_inputs"][torch.float32]
SHAPES = {"BC": "BTSGN", "dt": "BTH", "bias": "H", "log_A": "H"}


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("T", "G", "H", "N"), [(9, 1, 4, 16), (17, 2, 6, 5), (1, 1, 1, 1)])
def test_outputs_and_gradients(impl: str, T: int, G: int, H: int, N: int) -> None:
    a = inputs(T, SHAPES, seed=1, B=2, S=2, G=G, H=H, N=N)
    check_op(*(partial(ssd_inputs, impl=i) for i in ("reference", impl)), a, FP32)


def test_several_blocks_of_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("zoo.kernels.ssd_inputs.triton")
    for rule in ("config_of", "backward_config"):
        monkeypatch.setattr(fused, rule, lambda B: fused.Config(chunk=1, block=64, num_warps=4, num_stages=1))

    monkeypatch.setattr(fused, "SUMMING_PROGRAMS", 4)

    def op(xBC: torch.Tensor, impl: str, **others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ssd_inputs(xBC[..., 16:].unflatten(-1, (2, 2, 8)), **others, impl=impl)

    a = inputs(13, {"xBC": "BTD", "dt": "BTH", "bias": "H", "log_A": "H"}, B=2, D=48, H=4)
    check_op(*(partial(op, impl=i) for i in ("reference", "triton")), a, FP32)


def test_a_pack_is_one_call() -> None:
    pytest.importorskip("triton")
    a = inputs(5, {name: "P" + letters for name, letters in SHAPES.items()}, P=3, B=2, S=2, G=1, H=2, N=8)

    def loop(**b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        each = [ssd_inputs(*row, impl="reference") for row in zip(*b.values(), strict=True)]
        return tuple(torch.stack(column) for column in zip(*each, strict=True))

    pack = lambda **b: torch.func.vmap(partial(ssd_inputs, impl="triton"))(*b.values())  # noqa: E731
    check_op(loop, pack, a, FP32)


def test_dtypes_and_what_does_not_fit() -> None:
    a = {name: t.detach() for name, t in inputs(4, SHAPES, B=1, S=2, G=2, H=4, N=8).items()}
    for impl in ("reference", "chunked", "triton"):
        results = ssd_inputs(a["BC"].bfloat16(), a["dt"].half(), a["bias"], a["log_A"], impl=impl)
        assert [x.dtype for x in results] == [torch.bfloat16, torch.bfloat16, torch.float32]
    with pytest.raises(UnsupportedError, match="dt has shape"):
        ssd_inputs(**a | {"dt": a["dt"][:, :3]})
    with pytest.raises(UnsupportedError, match=r"expected \(B, T, 2, G, N\)"):
        ssd_inputs(**a | {"BC": a["BC"][:, :, :1]})
    with pytest.raises(UnsupportedError, match="3 heads in 2 groups"):
        ssd_inputs(**a | {name: a[name][..., :3] for name in ("dt", "bias", "log_A")})
