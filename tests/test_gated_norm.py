"""gated_norm: torch's norms and the fused kernels against the definition, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.gated_norm import gated_norm
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["gated_norm"][torch.float32]
TOKENS = {"x": "BTHV", "gate": "BTHV"}
CASES = [
    ({"x": "BTHV"}, {"scale": 0.25, "eps": 1e-3}),
    ({**TOKENS, "weight": "V"}, {}),
    ({**TOKENS, "weight": "HV", "bias": "HV"}, {"kind": "layer"}),
    ({**TOKENS, "weight": "V", "bias": "V"}, {"kind": "layer", "gate_first": True, "scale": 2.0}),
    ({**TOKENS, "weight": "HV"}, {"gate_first": True}),
]


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize(("shapes", "options"), CASES)
@pytest.mark.parametrize(("T", "H", "V"), [(9, 1, 16), (17, 3, 20)])
def test_outputs_and_gradients(impl: str, shapes: dict[str, str], options: dict, T: int, H: int, V: int) -> None:
    op = partial(gated_norm, **options)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), inputs(T, shapes, seed=1, B=2, H=H, V=V), FP32)


@pytest.mark.parametrize("shapes", [{**TOKENS, "weight": "HV"}, {**TOKENS, "weight": "V"}])
def test_several_blocks_and_programs(monkeypatch: pytest.MonkeyPatch, shapes: dict[str, str]) -> None:
    fused = pytest.importorskip("zoo.kernels.gated_norm.triton")
    small = fused.Config(chunk=1, block=64, num_warps=4, num_stages=1)
    monkeypatch.setattr(fused, "config_of", lambda x: small)
    monkeypatch.setattr(fused, "backward_config", lambda x: small)
    monkeypatch.setattr(fused, "PROGRAMS", 6)
    monkeypatch.setattr(fused, "SUMMING_PROGRAMS", 6)
    a = inputs(29, shapes, B=2, H=2, V=16)
    check_op(partial(gated_norm, impl="reference"), partial(gated_norm, impl="triton"), a, FP32)


def test_slices_are_read_in_place() -> None:
    pytest.importorskip("triton")
    a = inputs(7, {"projected": "BTD", "weight": "V"}, B=2, D=2 * 4 * 8 + 5, V=8)

    def op(projected: torch.Tensor, weight: torch.Tensor, impl: str) -> torch.Tensor:
        x, gate, _ = projected.split([32, 32, 5], dim=-1)
        x, gate = (y.unflatten(-1, (4, 8)) for y in (x, gate))
        return gated_norm(x, gate, weight, impl=impl)

    check_op(partial(op, impl="reference"), partial(op, impl="triton"), a, FP32)


@pytest.mark.parametrize("weight", ["PV", "PHV"])
def test_a_pack_is_one_call_with_weights_of_their_own(weight: str) -> None:
    pytest.importorskip("triton")
    shapes = {"x": "PBTHV", "gate": "PBTHV", "weight": weight}
    a = inputs(5, shapes, P=3, B=2, H=2, V=8)
    loop = lambda **b: torch.stack([gated_norm(*row, impl="reference") for row in zip(*b.values())])  # noqa: E731, B905
    pack = lambda **b: torch.func.vmap(partial(gated_norm, impl="triton"))(*b.values())  # noqa: E731
    check_op(loop, pack, a, FP32)


def test_dtypes_and_what_does_not_fit() -> None:
    a = {name: t.detach() for name, t in inputs(4, {**TOKENS, "weight": "V"}, B=1, H=2, V=8).items()}
    for impl in ("reference", "chunked", "triton"):
        y = gated_norm(a["x"].bfloat16(), a["gate"], a["weight"], impl=impl)
        assert y.dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="gate has shape"):
        gated_norm(a["x"], a["gate"][:, :3])
    with pytest.raises(UnsupportedError, match="kind 'batch' is unknown; use 'layer' or 'rms'"):
        gated_norm(a["x"], kind="batch")  # type: ignore[arg-type]
