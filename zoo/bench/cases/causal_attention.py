"""causal_attention as the mixers of MQAR use it: all keys of short sequences, and the published window."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.bench.case import MANY_HEADS, SMALL, Case, Cost, Draw, Op, Shape, register
from zoo.kernels.attention import causal_attention
from zoo.kernels.launch import Config

SHAPES = (SMALL, Shape(256, 64, 1, 64), Shape(256, 256, 1, 128), Shape(256, 256, 2, 32))


def _inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    return {name: draw.normal(*shape) for name in "qkv"}


def _least(shape: Shape, tensors: int, products: int, window: int) -> Cost:
    """Operations of the pairs that see each other."""
    B, T, H, D = shape
    pairs = sum(min(t + 1, window) for t in range(T))
    return Cost(tensors * B * T * H * D, 0, products * 2 * B * H * pairs * D)


def _flash(window: int | None) -> Op:
    return partial(causal_attention, window=window, impl="flash")


def _configs(shape: Shape) -> dict[str, list[Config]]:
    tried = [Config(*map(int, c.split())) for c in ("1 64 4 1", "1 64 4 2", "1 64 4 3", "1 64 8 1", "1 32 2 2")]
    return {f"attention.{kernel}": tried for kernel in ("forward", "query", "key")}


for _window in (None, 65):
    register(
        Case(
            name="causal_attention" if _window is None else f"causal_attention.window{_window}",
            tolerance="attention",
            inputs=_inputs,
            ours=partial(causal_attention, window=_window, impl="triton"),
            reference=partial(causal_attention, window=_window, impl="chunked"),
            torch=partial(causal_attention, window=_window, impl="chunked"),
            forward=partial(_least, tensors=4, products=2, window=_window or 2**31),
            both=partial(_least, tensors=12, products=7, window=_window or 2**31),
            peers={"torch FlashAttention": partial(_flash, _window)},
            shapes=SHAPES,
            large=(MANY_HEADS,),
            configs=_configs,
        )
    )
