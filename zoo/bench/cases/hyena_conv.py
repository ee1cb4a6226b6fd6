"""hyena_conv with a filter as long as the sequence and short convolutions of width 3. H * D channels."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.bench.case import Case, Draw, Shape, register
from zoo.bench.cases.long_conv import SHAPES, least
from zoo.kernels.hyena_conv import hyena_conv


def _inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, T, H, D = shape
    channels = H * D
    return {
        **{name: draw.normal(B, T, channels) for name in ("x1", "x2", "v")},
        "weight": draw.normal(3, channels, 3, scale=3**-0.5),
        "bias": draw.normal(3, channels),
        "kernel": draw.normal(channels, T, scale=T**-0.5),
        "skip": draw.normal(channels),
    }


register(
    Case(
        name="hyena_conv",
        tolerance="hyena_conv",
        inputs=_inputs,
        ours=partial(hyena_conv, impl="triton"),
        reference=partial(hyena_conv, impl="chunked"),
        torch=partial(hyena_conv, impl="chunked"),
        forward=partial(least, sequences=4, products=1),
        both=partial(least, sequences=11, products=3),
        shapes=SHAPES,
    )
)
