"""long_conv with a filter as long as the sequence: bare, and with the skip and the gate of Hyena. H * D channels."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.bench.case import SMALL, Case, Cost, Draw, Op, Shape, register
from zoo.kernels.launch import Config
from zoo.kernels.long_conv import long_conv

SHAPES = (SMALL, *(SMALL._replace(T=T) for T in (64, 1024, 2048)), SMALL._replace(H=2), Shape(8, 4096, 16, 64))


def _inputs(shape: Shape, draw: Draw, gated: bool) -> dict[str, Any]:
    B, T, H, D = shape
    channels = H * D
    inputs = {"u": draw.normal(B, T, channels), "kernel": draw.normal(channels, T, scale=T**-0.5)}
    if gated:
        inputs |= {"skip": draw.normal(channels), "gate": draw.normal(B, T, channels)}
    return inputs


def least(shape: Shape, sequences: int, products: int) -> Cost:
    """Operations: of every pair, or of the Fourier transforms, whichever are fewer."""
    B, T, H, D = shape
    per_token = min(T, 15 * math.log2(2 * T))
    return Cost(sequences * B * T * H * D, 0, products * B * T * H * D * per_token)


def _fft() -> Op:
    def fft(u: Tensor, kernel: Tensor, skip: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        n = 2 * u.shape[1]
        # Along the last axis, which takes two thirds of the time that it takes along the one before.
        product = torch.fft.rfft(u.mT.float(), n=n) * torch.fft.rfft(kernel.float(), n=n)
        y = torch.fft.irfft(product, n=n)[..., : u.shape[1]].mT
        if skip is not None:
            y = y + u * skip
        return (y if gate is None else y * gate).to(u.dtype)

    return fft


def _configs(shape: Shape) -> dict[str, list[Config]]:
    tried = ["64 64 4 3", "64 128 4 3", "64 128 8 2", "64 128 8 3", "64 256 8 2", "64 64 2 2", "32 64 4 2"]
    configs = [Config(*map(int, c.split())) for c in tried]
    return {"long_conv.forward": configs, "long_conv.backward": configs, "long_conv.pairs_backward": configs}


for _name, _gated in (("plain", False), ("hyena", True)):
    register(
        Case(
            name=f"long_conv.{_name}",
            tolerance="long_conv",
            inputs=partial(_inputs, gated=_gated),
            ours=partial(long_conv, impl="triton"),
            reference=partial(long_conv, impl="chunked"),
            torch=partial(long_conv, impl="chunked"),
            forward=partial(least, sequences=3 if _gated else 2, products=1),
            both=partial(least, sequences=8 if _gated else 5, products=3),
            peers={"torch.fft": _fft},
            shapes=SHAPES,
            configs=_configs,
        )
    )
