"""taylor_attention with BASED's 16 feature channels: the quadratic form, and the recurrent one where T is long."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.bench.case import SHAPES, Case, Cost, Draw, Op, Shape, register
from zoo.kernels.launch import Config
from zoo.kernels.taylor_attention import taylor_attention
from zoo.kernels.taylor_attention.features import num_features
from zoo.kernels.taylor_attention.triton import QUADRATIC_LENGTH

K = 16


def _inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, T, H, D = shape
    return {"q": draw.normal(B, T, H, K), "k": draw.normal(B, T, H, K), "v": draw.normal(B, T, H, D)}


def _least(shape: Shape, qk: int, vo: int, products: int) -> Cost:
    """Operations: of every pair, or of the features, whichever are fewer; products counts those in K and those in V."""
    B, T, H, D = shape
    tokens = B * T * H
    per_token = min(T * (K + D), 4 * num_features(K) * D)
    return Cost(tokens * (qk * K + vo * D), 0, products * tokens * per_token)


def _parallel() -> Op:
    from fla.ops.based import parallel_based

    return parallel_based


def _fused_chunk() -> Op:
    from fla.ops.based import fused_chunk_based

    return fused_chunk_based


def _configs(shape: Shape) -> dict[str, list[Config]]:
    if shape.T <= QUADRATIC_LENGTH:
        form, tried = "quadratic", ["64 64 4 1", "64 64 4 2", "64 64 4 3", "64 64 2 2", "32 64 2 2", "128 64 8 2"]
    else:
        form, tried = "recurrent", ["16 64 4 1", "16 64 4 2", "16 64 8 2", "32 64 8 2", "32 64 4 2", "16 32 4 2"]
    configs = [Config(*map(int, c.split())) for c in tried]
    return {f"taylor_attention.{form}_{which}": configs for which in ("forward", "backward")}


register(
    Case(
        name="taylor_attention",
        tolerance="taylor_attention",
        inputs=_inputs,
        ours=partial(taylor_attention, impl="triton", return_state=False),
        reference=partial(taylor_attention, impl="chunked", return_state=False),
        torch=partial(taylor_attention, impl="chunked", return_state=False),
        forward=partial(_least, qk=2, vo=2, products=1),
        both=partial(_least, qk=6, vo=6, products=3),
        peers={"fla parallel_based": _parallel, "fla fused_chunk_based": _fused_chunk},
        shapes=SHAPES,
        configs=_configs,
    )
)
