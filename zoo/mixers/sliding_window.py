"""Softmax attention to the last few tokens: recall that ends where the window ends, at a state of that size."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from zoo.mixers.attention import Attention, KVCache
from zoo.mixers.base import Mixer


class SlidingWindow(Attention):
    """`Attention` in which a query sees itself and the window - 1 tokens before it (arXiv 2004.05150, sec. 3.1).

    The published MQAR runs write `block_size: w` for what is a window of w + 1 here.
    """

    class Config(Attention.Config):
        window: int = Field(64, ge=1, description="Tokens that a query sees, itself among them.")

    config: Config

    @property
    def window(self) -> int:
        return self.config.window

    @property
    def state_horizon(self) -> int:
        return self.window - 1

    # It soon stops growing.
    reserve = Mixer.reserve
    step_at = Mixer.step_at

    def prefill(self, x: Tensor, state: KVCache | None = None) -> tuple[Tensor, KVCache]:
        before = self.init_state(len(x)) if state is None else state
        q, k, v = self.project(x)
        # Keys are cached unturned and turned by their place in the cache: distances count, so no position is kept.
        start = before.k.shape[1]
        k, v = torch.cat([before.k, k], dim=1), torch.cat([before.v, v], dim=1)
        y = self.attend(self.turn(q, start), self.turn(k), v)
        old = max(0, k.shape[1] - self.state_horizon)
        return y, KVCache(k[:, old:], v[:, old:])
