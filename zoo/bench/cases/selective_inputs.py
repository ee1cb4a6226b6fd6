"""selective_inputs with rank D / 16 and 16 states, as in Mamba. H * D channels."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.bench.case import Case, Cost, Draw, Shape, register
from zoo.kernels.selective_inputs import selective_inputs

N = 16


def _rank(shape: Shape) -> int:
    return max(1, shape.H * shape.D // 16)


def _inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, T, H, D = shape
    channels, R = H * D, _rank(shape)
    return {
        "x": draw.normal(B, T, channels),
        "weight": draw.normal(R + 2 * N, channels, scale=channels**-0.5),
        "dt_weight": draw.normal(channels, R, scale=R**-0.5),
    }


def _least(shape: Shape, wide: int, narrow: int, passes: int) -> Cost:
    """wide, narrow: how often tensors of all channels, and those between the products, are read or written."""
    tokens, channels, R = shape.B * shape.T, shape.H * shape.D, _rank(shape)
    flops = 2 * tokens * channels * (2 * R + 2 * N)
    return Cost(tokens * (wide * channels + narrow * (R + 2 * N)), 0, passes * flops)


register(
    Case(
        name="selective_inputs",
        tolerance="linear",
        inputs=_inputs,
        ours=partial(selective_inputs, impl="triton"),
        reference=partial(selective_inputs, impl="chunked"),
        torch=partial(selective_inputs, impl="chunked"),
        # x, dt; back x, the gradients of x, dt and what is between, and x's in all.
        forward=partial(_least, wide=2, narrow=1, passes=1),
        both=partial(_least, wide=6, narrow=3, passes=3),
    )
)
