"""taylor_attention with 16 feature channels as in BASED, and others: all pairs, and states between chunks of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.bench.case import SHAPES, SMALL, Case, Cost, Draw, Op, Shape, register
from zoo.kernels.launch import Config
from zoo.kernels.taylor_attention import taylor_attention
from zoo.kernels.taylor_attention.features import num_features


def _inputs(shape: Shape, draw: Draw, K: int) -> dict[str, Any]:
    B, T, H, D = shape
    return {"q": draw.normal(B, T, H, K), "k": draw.normal(B, T, H, K), "v": draw.normal(B, T, H, D)}


def _least(shape: Shape, K: int, qk: int, vo: int, products: int) -> Cost:
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
    tried = ["64 64 4 1", "64 64 4 2", "64 64 4 3", "64 32 4 2", "64 32 4 3", "32 32 2 2"]
    pairs = [Config(*map(int, c.split())) for c in tried]
    sums = [Config(*map(int, c.split())) for c in ("32 64 4 2", "64 64 4 1", "64 64 4 2", "64 64 8 2", "128 64 8 2")]
    kernels = {f"taylor_attention.{kernel}": pairs for kernel in ("forward", "query_backward", "key_backward")}
    return kernels | {"taylor_attention.sums": sums}


for _K in (16, 8, 24, 32):
    register(
        Case(
            name="taylor_attention" if _K == 16 else f"taylor_attention.f{_K}",
            tolerance="taylor_attention",
            inputs=partial(_inputs, K=_K),
            ours=partial(taylor_attention, impl="triton", return_state=False),
            reference=partial(taylor_attention, impl="chunked", return_state=False),
            torch=partial(taylor_attention, impl="chunked", return_state=False),
            forward=partial(_least, K=_K, qk=2, vo=2, products=1),
            both=partial(_least, K=_K, qk=6, vo=6, products=3),
            peers={"fla parallel_based": _parallel, "fla fused_chunk_based": _fused_chunk},
            shapes=SHAPES if _K == 16 else (SMALL, SHAPES[-1]),
            configs=_configs,
        )
    )
