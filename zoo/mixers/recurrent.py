"""Mixers built on ops that take a state and give one: all forms are one function of a segment and what came before."""

from __future__ import annotations

from torch import Tensor

from zoo.mixers.base import Mixer
from zoo.state import State


class RecurrentMixer(Mixer):
    """Subclasses define `mix` and `init_state`; forward, prefill and step follow."""

    def mix(self, x: Tensor, state: State, return_state: bool) -> tuple[Tensor, State]:
        """x (B, T, D), the state before it (None: the initial one) -> y (B, T, D), the state after it.

        With return_state=False the second result is not used, and should cost nothing.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, None, return_state=False)[0]

    def prefill(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        return self.mix(x, state, return_state=True)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.mix(x_t[:, None], state, return_state=True)
        return y[:, 0], state
