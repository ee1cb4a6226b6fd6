"""residual_norm: torch's norms and the fused kernels against the definition, alone and as a pack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import inputs

from zoo.errors import UnsupportedError
from zoo.kernels.launch import Config
from zoo.kernels.residual_norm import residual_norm
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["residual_norm"][torch.float32]
SHAPES = {"x": "TD", "branch": "TD", "weight": "D", "bias": "D"}


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("rows", "D"), [(1, 1), (17, 16), (130, 48), (3, 5000)])
def test_outputs_and_gradients(impl: str, kind: str, rows: int, D: int) -> None:
    if D == 1:
        kind = "rms"  # The deviation from the mean of one channel is 0, and says nothing.
    op = partial(residual_norm, kind=kind)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), inputs(rows, SHAPES, D=D), FP32)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_without_a_bias_and_with_more_axes(impl: str) -> None:
    a = inputs(7, {"x": "BTD", "branch": "BTD", "weight": "D"}, B=3, D=24)
    op = partial(residual_norm, kind="rms", eps=1e-3)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, FP32)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_without_a_branch_the_stream_goes_on_as_it_is(impl: str) -> None:
    a = inputs(20, {"x": "TD", "weight": "D", "bias": "D"}, D=24)
    check_op(*(partial(residual_norm, branch=None, impl=i) for i in ("reference", impl)), a, FP32)


def test_several_programs_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("zoo.kernels.residual_norm.triton")
    for name in ("config_of", "backward_config"):
        monkeypatch.setattr(fused, name, lambda x: Config(1, 32, 1, 1))
    monkeypatch.setattr(fused, "PROGRAMS", 5)
    a = inputs(77, SHAPES, D=16)
    check_op(partial(residual_norm, impl="reference"), partial(residual_norm, impl="triton"), a, FP32)


def test_a_pack_is_one_call_with_weights_of_their_own() -> None:
    pytest.importorskip("triton")
    a = inputs(9, {"x": "PTD", "branch": "PTD", "weight": "PD", "bias": "PD"}, P=3, D=20)
    loop = lambda **b: torch.stack([residual_norm(*row, impl="reference").normed for row in zip(*b.values())])  # noqa: E731, B905
    pack = lambda **b: torch.func.vmap(partial(residual_norm, impl="triton"))(*b.values()).normed  # noqa: E731
    check_op(loop, pack, a, FP32)


def test_dtypes_and_what_does_not_fit() -> None:
    a = {name: t.detach() for name, t in inputs(4, SHAPES, D=8).items()}
    a["branch"] = a["branch"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        stream, normed = residual_norm(**a)
    assert (stream.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    with pytest.raises(UnsupportedError, match="branch has shape"):
        residual_norm(a["x"], a["branch"][:, :3], a["weight"])
    with pytest.raises(UnsupportedError, match="kind 'batch' is unknown; use 'layer' or 'rms'"):
        residual_norm(a["x"], a["branch"], a["weight"], kind="batch")  # type: ignore[arg-type]
    x, tokens, table = torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.rand(9, 4)
    with pytest.raises(UnsupportedError, match="positions has shape"):
        residual_norm(x, None, torch.rand(4), positions=torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="tokens has shape"):
        residual_norm(x, None, torch.rand(4), lookup=(tokens[:, :2], table))
    with pytest.raises(UnsupportedError, match="table has shape"):
        residual_norm(x, None, torch.rand(4), lookup=(tokens, table[:, :3]))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("B", "T", "Q", "D"), [(3, 12, 4, 16), (2, 7, 5, 20), (1, 64, 70, 4)])
def test_a_stream_wanted_at_positions(impl: str, kind: str, B: int, T: int, Q: int, D: int) -> None:
    positions = torch.randint(T, (B, Q), generator=torch.Generator().manual_seed(T))
    op = partial(residual_norm, kind=kind, positions=positions)
    a = inputs(T, {"x": "BTD", "branch": "BTD", "weight": "D"}, B=B, D=D)
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, FP32)


def test_a_pack_whose_members_want_other_positions() -> None:
    pytest.importorskip("triton")
    a = inputs(8, {"x": "PBTD", "branch": "PBTD", "weight": "PD", "bias": "PD"}, P=3, B=2, D=16)
    positions = torch.randint(8, (3, 2, 3), generator=torch.Generator().manual_seed(0))

    def loop(**b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = zip(*b.values(), positions, strict=True)
        each = [residual_norm(*row, positions=asked, impl="reference") for *row, asked in rows]
        return tuple(torch.stack(column) for column in zip(*each, strict=True))

    def pack(**b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        op = torch.func.vmap(lambda *row: tuple(residual_norm(*row[:-1], positions=row[-1], impl="triton")))
        return op(*b.values(), positions)

    check_op(loop, pack, a, FP32)
