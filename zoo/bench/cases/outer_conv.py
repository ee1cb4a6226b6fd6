"""outer_conv with a filter as long as the sequence and heads of two channels, as in H3. H * D channels."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.bench.case import Case, Draw, Shape, register
from zoo.bench.cases.long_conv import SHAPES, least
from zoo.kernels.outer_conv import outer_conv


def _inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, T, H, D = shape
    heads = H * D // 2
    return {
        "q": draw.normal(B, T, 2, heads),
        "k": draw.normal(B, 2, heads, T),
        "v": draw.normal(B, T, 2, heads),
        "kernel": draw.normal(heads, T, scale=T**-0.5),
        "skip": draw.normal(heads),
    }


register(
    Case(
        name="outer_conv",
        tolerance="outer_conv",
        inputs=_inputs,
        ours=partial(outer_conv, impl="triton"),
        reference=partial(outer_conv, impl="chunked"),
        torch=partial(outer_conv, impl="chunked"),
        # Four products of channels a head of two.
        forward=partial(least, sequences=4, products=2),
        both=partial(least, sequences=11, products=6),
        shapes=SHAPES,
    )
)
