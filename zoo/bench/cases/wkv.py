"""wkv, RWKV-4's average, of H * D channels."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from zoo.bench.case import Case, Cost, Draw, Op, Shape, register
from zoo.kernels.launch import Config
from zoo.kernels.wkv import NO_TOKEN, wkv


def _inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, T, H, D = shape
    inputs = {"k": draw.normal(B, T, H * D), "v": draw.normal(B, T, H * D)}
    return inputs | {"decay": draw.log_decay(H * D), "bonus": draw.normal(H * D).detach().float().requires_grad_()}


def _least(shape: Shape, sequences: int, operations: int) -> Cost:
    elements = shape.B * shape.T * shape.H * shape.D
    return Cost(sequences * elements, 0, operations * elements)


def _fla() -> Op:
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    def run(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
        state = k.new_zeros(len(k), 3, 1, k.shape[-1])
        state[:, 2] = NO_TOKEN
        return fused_recurrent_rwkv4((-decay).log(), bonus, k, v, state)[0]

    return run


def _configs(shape: Shape) -> dict[str, list[Config]]:
    tried = ["8 32 1 1", "4 32 1 1", "16 32 1 1", "4 64 1 1", "8 64 1 1", "8 64 2 1", "16 64 2 1", "8 16 1 1"]
    return {"wkv.walk": [Config(*map(int, c.split())) for c in tried]}


register(
    Case(
        name="wkv",
        tolerance="wkv",
        inputs=_inputs,
        ours=partial(wkv, return_state=False, impl="triton"),
        reference=partial(wkv, return_state=False, impl="chunked"),
        torch=None,
        forward=partial(_least, sequences=3, operations=20),
        both=partial(_least, sequences=8, operations=60),
        peers={"fla fused_recurrent_rwkv4": _fla},
        configs=_configs,
    )
)
