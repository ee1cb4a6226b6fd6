"""selective_scan as Mamba has it: 16 states, a skip and a gate, H * D channels. No peer installs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from zoo.bench.case import Case, Cost, Draw, Shape, register
from zoo.kernels.launch import Config
from zoo.kernels.selective_scan import selective_scan

N = 16
SHAPES = (Shape(256, 256, 2, 64), Shape(256, 64, 2, 64), Shape(256, 256, 1, 64), Shape(8, 4096, 16, 64))


def _inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, T, H, D = shape
    channels = H * D
    inputs = {"x": draw.normal(B, T, channels)}
    # Steps about Mamba's range of 0.001 to 0.1, states that forget at rates about 1 to N.
    inputs["dt"] = (draw.normal(B, T, channels).detach() - 4).exp().requires_grad_()
    inputs["A"] = (-4 * draw.normal(channels, N).detach().float().exp()).requires_grad_()
    inputs |= {"B": draw.normal(B, T, N), "C": draw.normal(B, T, N)}
    inputs["D"] = draw.normal(channels).detach().float().requires_grad_()
    inputs["z"] = draw.normal(B, T, channels)
    return inputs


def _biased_inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    """The same with steps before their softplus, as Mamba's projection gives them, and biases."""
    inputs = _inputs(shape, draw)
    inputs["dt"] = draw.normal(shape.B, shape.T, shape.H * shape.D)
    inputs["dt_bias"] = (draw.normal(shape.H * shape.D).detach().float() - 4).requires_grad_()
    return inputs


def _least(shape: Shape, wide: int, narrow: int, operations: int) -> Cost:
    """`wide` sequences of H * D channels and `narrow` ones of N states; operations on each state at each step."""
    tokens, channels = shape.B * shape.T, shape.H * shape.D
    return Cost((wide * channels + narrow * N) * tokens, 0, operations * tokens * channels * N)


def _configs(shape: Shape) -> dict[str, list[Config]]:
    tried = ["4 32 1 1", "4 64 2 1"]
    return {f"selective_scan.{way}": [Config(*map(int, c.split())) for c in tried] for way in ("forward", "backward")}


def _register(name: str, inputs: Callable[[Shape, Draw], dict[str, Any]]) -> None:
    register(
        Case(
            name=name,
            tolerance="selective_scan",
            inputs=inputs,
            ours=partial(selective_scan, return_state=False, impl="triton"),
            reference=partial(selective_scan, return_state=False, impl="chunked"),
            torch=None,
            forward=partial(_least, wide=4, narrow=2, operations=7),
            both=partial(_least, wide=8, narrow=4, operations=28),
            shapes=SHAPES,
            configs=_configs,
        )
    )


_register("selective_scan", _inputs)
_register("selective_scan.bias", _biased_inputs)
