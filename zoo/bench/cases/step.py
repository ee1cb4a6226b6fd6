"""One token of a decode, of every op that has a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.bench.case import Case, Cost, Draw, Op, Shape, register
from zoo.kernels.delta_rule import delta_rule, generalized_delta_rule
from zoo.kernels.launch import Config
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.kernels.selective_scan import selective_scan
from zoo.kernels.short_conv import short_conv
from zoo.kernels.taylor_attention import TaylorState, taylor_attention
from zoo.kernels.taylor_attention.features import num_features
from zoo.kernels.wkv import WKVState, wkv
from zoo.state import map_tensors

SHAPES = (Shape(256, 1, 1, 64), Shape(256, 1, 2, 32), Shape(8, 1, 16, 64))
FEATURES, STATES, WIDTH = 16, 16, 4


def _qkv(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, _, H, D = shape
    q, v, S = draw.normal(B, 1, H, D, scale=D**-0.5), draw.normal(B, 1, H, D), draw.normal(B, H, D, D).float()
    # Of length 1, as the delta rules need it to be stable.
    k = torch.nn.functional.normalize(draw.normal(B, 1, H, D), dim=-1)
    return {"q": q, "k": k, "v": v, "initial_state": S}


def _linear(shape: Shape, draw: Draw, decay: str = "", bonus: bool = False) -> dict[str, Any]:
    B, _, H, D = shape
    inputs = _qkv(shape, draw)
    if decay:
        inputs["decay"] = draw.log_decay(*{"head": (H,), "step": (B, 1, H), "channel": (B, 1, H, D)}[decay])
    if bonus:
        inputs["bonus"] = draw.normal(H, D)
    return inputs


def _delta(shape: Shape, draw: Draw, decay: str = "") -> dict[str, Any]:
    return _linear(shape, draw, decay) | {"beta": draw.normal(shape.B, 1, shape.H).sigmoid()}


def _generalized(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, _, H, D = shape
    a = torch.nn.functional.normalize(draw.normal(B, 1, H, D), dim=-1)
    return _linear(shape, draw, "channel") | {"a": -a, "b": a * draw.normal(B, 1, H, D).sigmoid()}


def _taylor(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, _, H, D = shape
    F = num_features(FEATURES)
    S, z = draw.normal(B, H, F, D).float(), 100 + draw.normal(B, H, F).float()
    q, k = draw.normal(B, 1, H, FEATURES), draw.normal(B, 1, H, FEATURES)
    return {"q": q, "k": k, "v": draw.normal(B, 1, H, D), "initial_state": TaylorState(S, z)}


def _scan(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, D, N = shape.B, shape.H * shape.D, STATES
    inputs = {name: draw.normal(B, 1, D) for name in ("x", "z")} | {n: draw.normal(B, 1, N) for n in ("B", "C")}
    inputs |= {"dt": -draw.log_decay(B, 1, D), "A": draw.log_decay(D, N), "D": draw.normal(D)}
    return inputs | {"initial_state": draw.normal(B, D, N).float()}


def _conv(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, D = shape.B, shape.H * shape.D
    inputs = {"x": draw.normal(B, 1, D), "weight": draw.normal(D, WIDTH), "bias": draw.normal(D)}
    return inputs | {"initial_state": draw.normal(B, WIDTH - 1, D)}


def _average(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, D = shape.B, shape.H * shape.D
    inputs = {"k": draw.normal(B, 1, D), "v": draw.normal(B, 1, D), "decay": draw.log_decay(D), "bonus": draw.normal(D)}
    numerator, denominator, largest = (draw.normal(B, D).float() for _ in range(3))
    return inputs | {"initial_state": WKVState(numerator, denominator.exp(), largest)}


def _detached(shape: Shape, draw: Draw, inputs: Callable[[Shape, Draw], dict[str, Any]]) -> dict[str, Any]:
    """A step takes no gradient: where one is asked for, the op runs as over many tokens."""
    return {name: map_tensors(Tensor.detach, x) for name, x in inputs(shape, draw).items()}


def _least(shape: Shape, inputs: Callable[[Shape, Draw], dict[str, Any]]) -> Cost:
    """Every input read once, as many vectors written as v or x has, every state written; an update and a reading."""
    given = _detached(shape._replace(B=1), Draw("cpu", torch.bfloat16, 0), inputs)
    state = given.pop("initial_state")
    tensors = state if isinstance(state, tuple) else (state,)
    output = given["x"] if "x" in given else given["v"]
    sizes = {2: 0.0, 4: 0.0}
    for t in (*given.values(), output, *tensors, *tensors):
        sizes[t.element_size()] += shape.B * t.numel()
    return Cost(sizes[2], sizes[4], 4 * shape.B * sum(t.numel() for t in tensors))


def _fla(module: str, function: str, call: Callable[[Op, Any], Any]) -> Callable[[], Op]:
    def load() -> Op:
        import importlib

        op = getattr(importlib.import_module(f"fla.ops.{module}"), function)
        return lambda **x: call(op, x)

    return load


def _recurrent(op: Op, x: dict[str, Any], **names: str) -> Any:
    """fla's kernels for a few tokens; `names` are its own for arguments of ours."""
    x = {names.get(name, name): t for name, t in x.items()}
    return op(**x, scale=1.0, output_final_state=True)


def _configs(shape: Shape, kernel: str) -> dict[str, list[Config]]:
    chunks = (16, 32, 64) if kernel == "taylor_attention" else (1,)
    return {f"{kernel}.step": [Config(c, b, w, 1) for c in chunks for b in (8, 16, 32, 64) for w in (1, 2, 4)]}


def _register(
    name: str, op: Op, inputs: Callable[[Shape, Draw], dict[str, Any]], peers: Mapping[str, Callable[[], Op]] = {}
) -> None:
    kernel = name.split(".")[0]
    register(
        Case(
            name=f"step.{name}",
            tolerance="delta_rule" if kernel == "generalized_delta_rule" else kernel,
            inputs=partial(_detached, inputs=inputs),
            ours=partial(op, impl="step_triton"),
            reference=partial(op, impl="reference"),
            torch=partial(op, impl="step"),
            forward=partial(_least, inputs=inputs),
            both=None,
            peers=peers,
            shapes=SHAPES,
            configs=partial(_configs, kernel=kernel.removeprefix("generalized_")),
        )
    )


_SIMPLE = _fla("simple_gla", "fused_recurrent_simple_gla", partial(_recurrent, decay="g"))
_GLA = _fla("gla", "fused_recurrent_gla", partial(_recurrent, decay="gk"))
_RWKV6 = _fla("rwkv6", "fused_recurrent_rwkv6", partial(_recurrent, q="r", decay="w", bonus="u"))
_DELTA = _fla("delta_rule", "fused_recurrent_delta_rule", _recurrent)
_GATED = _fla("gated_delta_rule", "fused_recurrent_gated_delta_rule", partial(_recurrent, decay="g"))
_RWKV7 = _fla("rwkv7", "fused_recurrent_rwkv7", partial(_recurrent, q="r", decay="w"))

_register("linear_recurrence.none", linear_recurrence, _linear)
_register("linear_recurrence.head", linear_recurrence, partial(_linear, decay="head"))
_register(
    "linear_recurrence.step",
    linear_recurrence,
    partial(_linear, decay="step"),
    {"fla fused_recurrent_simple_gla": _SIMPLE},
)
_register(
    "linear_recurrence.channel",
    linear_recurrence,
    partial(_linear, decay="channel"),
    {"fla fused_recurrent_gla": _GLA},
)
_register(
    "linear_recurrence.bonus",
    linear_recurrence,
    partial(_linear, decay="channel", bonus=True),
    {"fla fused_recurrent_rwkv6": _RWKV6},
)
_register("delta_rule.none", delta_rule, _delta, {"fla fused_recurrent_delta_rule": _DELTA})
_register(
    "delta_rule.step", delta_rule, partial(_delta, decay="step"), {"fla fused_recurrent_gated_delta_rule": _GATED}
)
_register("delta_rule.channel", delta_rule, partial(_delta, decay="channel"))
_register("generalized_delta_rule", generalized_delta_rule, _generalized, {"fla fused_recurrent_rwkv7": _RWKV7})
_register("taylor_attention", taylor_attention, _taylor)
_register("selective_scan", selective_scan, _scan)
_register("short_conv", partial(short_conv, activation="silu"), _conv)
_register("wkv", wkv, _average)
