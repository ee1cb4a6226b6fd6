"""linear_recurrence without a decay, and with one per head, per step, per channel, and with RWKV-6's bonus."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from zoo.bench.case import Case, Cost, Draw, Op, Shape, register
from zoo.kernels.launch import Config
from zoo.kernels.linear_recurrence import linear_recurrence


def _inputs(shape: Shape, draw: Draw, decay: str, bonus: bool) -> dict[str, Any]:
    B, T, H, D = shape
    qkv = {"q": draw.normal(B, T, H, D, scale=D**-0.5), "k": draw.normal(B, T, H, D), "v": draw.normal(B, T, H, D)}
    if decay == "head":
        # RetNet's constants.
        qkv["decay"] = (1 - 2.0 ** (-5 - torch.arange(H, device=draw.device, dtype=torch.float32))).log()
    elif decay:
        qkv["decay"] = draw.log_decay(*{"step": (B, T, H), "channel": (B, T, H, D)}[decay])
    if bonus:
        qkv["bonus"] = draw.normal(H, D)
    return qkv


def _forward(shape: Shape, decay: str) -> Cost:
    tokens = shape.B * shape.T * shape.H
    return Cost(4 * tokens * shape.D, _decays(shape, decay), 4 * tokens * shape.D**2)


def _both(shape: Shape, decay: str) -> Cost:
    tokens = shape.B * shape.T * shape.H
    decays = _decays(shape, decay) * (1 if decay == "head" else 3)
    return Cost(11 * tokens * shape.D, decays, 14 * tokens * shape.D**2)


def _decays(shape: Shape, decay: str) -> int:
    B, T, H, D = shape
    return {"": 0, "head": H, "step": B * T * H, "channel": B * T * H * D}[decay]


def _linear_attention() -> Op:
    from fla.ops.linear_attn import fused_chunk_linear_attn

    return lambda q, k, v: fused_chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]


def _retention() -> Op:
    from fla.ops.retention import fused_chunk_retention

    return lambda q, k, v, decay: fused_chunk_retention(q, k, v, scale=1.0)[0]


def _simple_gla_fused() -> Op:
    from fla.ops.simple_gla import fused_chunk_simple_gla

    return lambda q, k, v, decay: fused_chunk_simple_gla(q, k, v, g=decay, scale=1.0)[0]


def _simple_gla() -> Op:
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v, decay: chunk_simple_gla(q, k, v, g=decay, scale=1.0)[0]


def _gla() -> Op:
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, decay: chunk_gla(q, k, v, g=decay, scale=1.0)[0]


def _rwkv6() -> Op:
    from fla.ops.rwkv6 import chunk_rwkv6

    return lambda q, k, v, decay, bonus: chunk_rwkv6(q, k, v, decay, bonus, scale=1.0)[0]


def _configs(shape: Shape, kind: str) -> dict[str, list[Config]]:
    walks = ["64 64 4 1", "64 64 4 2", "64 64 4 3", "64 64 8 2", "64 32 4 3", "32 64 4 2", "32 64 4 3", "32 32 2 3"]
    chunks = [f"{chunk} {block} {num_warps} 1" for chunk in (16, 32) for block in (32, 64) for num_warps in (1, 2, 4)]
    if kind == "channel":
        # Once a chunk is chosen, by the first kernel, the others have it too.
        tried = {"prepare": chunks, "forward": walks[:5], "carry_backward": walks[:5], "chunks_backward": chunks[6:]}
    else:
        tried = {
            "forward": walks,
            "walk_backward": walks[:4],
            "carry_backward": walks[:5],
            "chunks_backward": chunks[6:],
        }
    return {
        f"linear_recurrence.{kind}_{kernel}": [Config(*map(int, config.split())) for config in configs]
        for kernel, configs in tried.items()
    }


for _name, _decay, _bonus, _peers in (
    ("linear_attention", "", False, {"fla fused_chunk_linear_attn": _linear_attention}),
    ("retnet", "head", False, {"fla fused_chunk_retention": _retention}),
    ("mamba2", "step", False, {"fla fused_chunk_simple_gla": _simple_gla_fused, "fla chunk_simple_gla": _simple_gla}),
    ("gla", "channel", False, {"fla chunk_gla": _gla}),
    ("rwkv6", "channel", True, {"fla chunk_rwkv6": _rwkv6}),
):
    _kind = "channel" if _decay == "channel" else "scalar"
    register(
        Case(
            name=f"linear_recurrence.{_name}",
            tolerance="linear_recurrence",
            inputs=partial(_inputs, decay=_decay, bonus=_bonus),
            ours=partial(linear_recurrence, impl="triton", return_state=False),
            reference=partial(linear_recurrence, impl="chunked", return_state=False),
            torch=partial(linear_recurrence, impl="chunked", return_state=False),
            forward=partial(_forward, decay=_decay),
            both=partial(_both, decay=_decay),
            peers=_peers,
            configs=partial(_configs, kind=_kind),
        )
    )
