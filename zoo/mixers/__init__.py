"""Sequence mixers: one file each. `get_mixer(name)` gives the class; `@register_mixer(name)` adds one.

The base classes are imported when they are first used: the names of the mixers can be listed without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zoo.registry import Registry

if TYPE_CHECKING:
    from zoo.mixers.base import LayerInfo, Mixer, MixerConfig, head_dim

mixers: Registry[Mixer] = Registry(
    kind="mixer",
    base=lambda: importlib.import_module("zoo.mixers.base").Mixer,
    group="zoo.mixers",
    builtins={
        "attention": "zoo.mixers.attention:Attention",
        "based": "zoo.mixers.based:Based",
        "delta_net": "zoo.mixers.delta_net:DeltaNet",
        "gated_conv": "zoo.mixers.gated_conv:GatedConv",
        "gated_delta_net": "zoo.mixers.gated_delta_net:GatedDeltaNet",
        "gla": "zoo.mixers.gla:GLA",
        "h3": "zoo.mixers.h3:H3",
        "hyena": "zoo.mixers.hyena:Hyena",
        "linear_attention": "zoo.mixers.linear_attention:LinearAttention",
        "mamba": "zoo.mixers.mamba:Mamba",
        "mamba2": "zoo.mixers.mamba2:Mamba2",
        "mingru": "zoo.mixers.mingru:MinGRU",
        "retnet": "zoo.mixers.retnet:RetNet",
        "rwkv4": "zoo.mixers.rwkv4:RWKV4",
        "rwkv6": "zoo.mixers.rwkv6:RWKV6",
        "rwkv7": "zoo.mixers.rwkv7:RWKV7",
        "s4d": "zoo.mixers.s4d:S4D",
        "sliding_window": "zoo.mixers.sliding_window:SlidingWindow",
    },
)
register_mixer = mixers.register
get_mixer = mixers.get

__all__ = ["LayerInfo", "Mixer", "MixerConfig", "get_mixer", "head_dim", "mixers", "register_mixer"]


def __getattr__(name: str) -> Any:
    if name not in ("LayerInfo", "Mixer", "MixerConfig", "head_dim"):
        raise AttributeError(f"module 'zoo.mixers' has no attribute {name!r}")
    return getattr(importlib.import_module("zoo.mixers.base"), name)
