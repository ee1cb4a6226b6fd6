"""Mixers built on ops that take a state and give one: all forms are one function of a segment and what came before."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from zoo.kernels.joined_rows import joined_rows
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


Pick = Callable[[Tensor], Tensor]
"""Of y (B, T, ...) what stands at some positions, (B, Q, ...)."""


def everywhere(y: Tensor) -> Tensor:
    return y


class ReadoutMixer(RecurrentMixer):
    """A RecurrentMixer that ends in operations on each position alone: in a last layer, on those that are asked only.

    Subclasses call `pick` on all that these operations take.
    """

    def mix(self, x: Tensor, state: State, return_state: bool, pick: Pick = everywhere) -> tuple[Tensor, State]:
        raise NotImplementedError

    def forward_at(self, x: Tensor, positions: Tensor) -> Tensor:
        def pick(y: Tensor) -> Tensor:
            return joined_rows(y.flatten(2), None, positions).view(*positions.shape, *y.shape[2:])

        return self.mix(x, None, False, pick)[0]
