"""rwkv7_keys and rwkv7_readout: torch's norms and the fused kernels against the definitions, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.rwkv7 import rwkv7_keys, rwkv7_readout
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["rwkv7"][torch.float32]
KEYS = {"k": "BTHK", "rate": "BTHK", "rate_bias": "HK", "removal": "HK", "replacement": "HK"}
READOUT = dict.fromkeys(("o", "q", "k", "v", "gate"), "BTHK") | dict.fromkeys(("weight", "bias", "bonus"), "HK")
OPS = [(rwkv7_keys, KEYS), (rwkv7_readout, READOUT)]


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("op", "shapes"), OPS)
@pytest.mark.parametrize(("T", "H", "K"), [(9, 1, 16), (17, 3, 20)])
def test_outputs_and_gradients(impl: str, op, shapes: dict[str, str], T: int, H: int, K: int) -> None:
    a = inputs(T, shapes, seed=1, B=2, H=H, K=K)
    check_op(*(partial(op, impl=i) for i in ("reference", impl)), a, FP32)


@pytest.mark.parametrize(("op", "shapes"), OPS)
def test_several_blocks_and_programs(monkeypatch: pytest.MonkeyPatch, op, shapes: dict[str, str]) -> None:
    fused = pytest.importorskip("zoo.kernels.rwkv7.triton")
    small = fused.Config(chunk=1, block=64, num_warps=4, num_stages=1)
    monkeypatch.setattr(fused, "config_of", lambda x: small)
    monkeypatch.setattr(fused, "backward_config", lambda x: small)
    monkeypatch.setattr(fused, "PROGRAMS", 6)
    monkeypatch.setattr(fused, "SUMMING_PROGRAMS", 6)
    a = inputs(29, shapes, B=2, H=2, K=16)
    check_op(*(partial(op, impl=i) for i in ("reference", "triton")), a, FP32)


@pytest.mark.parametrize(("op", "shapes"), OPS)
def test_a_pack_is_one_call_with_weights_of_their_own(op, shapes: dict[str, str]) -> None:
    pytest.importorskip("triton")
    a = inputs(5, {name: "P" + letters for name, letters in shapes.items()}, P=3, B=2, H=2, K=8)

    def stacked(**b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = [op(*row, impl="reference") for row in zip(*b.values(), strict=True)]
        if op is rwkv7_readout:
            return (torch.stack(results),)
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    def pack(**b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = torch.func.vmap(partial(op, impl="triton"))(*b.values())
        return (results,) if op is rwkv7_readout else tuple(results)

    check_op(stacked, pack, a, FP32)


@pytest.mark.parametrize(("op", "shapes"), OPS)
def test_dtypes_and_what_does_not_fit(op, shapes: dict[str, str]) -> None:
    a = {name: t.detach() for name, t in inputs(4, shapes, B=1, H=2, K=8).items()}
    first = next(iter(a))
    for impl in ("reference", "chunked", "triton"):
        y = op(**a | {first: a[first].bfloat16()}, impl=impl)
        assert {t.dtype for t in ([y] if op is rwkv7_readout else y)} == {torch.bfloat16}
    last = list(a)[-1]
    with pytest.raises(UnsupportedError, match=f"{last} has shape"):
        op(**a | {last: a[last][:1]})
