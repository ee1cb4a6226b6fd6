"""short_conv of width 4 with a bias, bare and with SiLU. H * D channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F

from zoo.bench.case import Case, Cost, Draw, Op, Shape, register
from zoo.kernels.launch import Config
from zoo.kernels.short_conv import short_conv

W = 4


def _inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, T, H, D = shape
    return {"x": draw.normal(B, T, H * D), "weight": draw.normal(H * D, W, scale=W**-0.5), "bias": draw.normal(H * D)}


def _least(shape: Shape, sequences: int, products: int) -> Cost:
    """`sequences` of H * D channels read or written."""
    elements = shape.B * shape.T * shape.H * shape.D
    return Cost(sequences * elements, 0, products * 2 * W * elements)


def _fla(activation: str | None) -> Op:
    from fla.modules.convolution import causal_conv1d

    return lambda x, weight, bias: causal_conv1d(x, weight, bias, activation=activation)[0]


def _conv1d(activation: str | None) -> Op:
    def conv1d(x: Any, weight: Any, bias: Any) -> Any:
        y = F.conv1d(x.mT, weight[:, None], bias, padding=W - 1, groups=len(weight))[..., : x.shape[1]].mT
        return F.silu(y) if activation == "silu" else y

    return conv1d


def _configs(shape: Shape) -> dict[str, list[Config]]:
    tried = ["16 64 2 1", "16 64 4 1", "32 64 2 1", "32 64 4 1", "64 64 4 1", "16 128 4 1", "32 32 1 1", "8 64 4 1"]
    configs = [Config(*map(int, c.split())) for c in tried]
    return {"short_conv.forward": configs, "short_conv.backward": configs}


for _name, _activation in (("linear", None), ("silu", "silu")):
    register(
        Case(
            name=f"short_conv.{_name}",
            tolerance="short_conv",
            inputs=_inputs,
            ours=partial(short_conv, activation=_activation, return_state=False, impl="triton"),
            reference=partial(short_conv, activation=_activation, return_state=False, impl="chunked"),
            torch=partial(short_conv, activation=_activation, return_state=False, impl="chunked"),
            forward=partial(_least, sequences=2, products=1),
            both=partial(_least, sequences=5, products=3),
            peers={"fla causal_conv1d": partial(_fla, _activation), "torch conv1d": partial(_conv1d, _activation)},
            configs=_configs,
        )
    )
