"""Mixers built on ops that take a state and give one: all forms are one function of a segment and what came before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from zoo.kernels.gather_rows import gather_rows
from zoo.kernels.kept_rows import kept_rows
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


@dataclass(frozen=True)
class At:
    """The Pick of what stands at positions (B, Q)."""

    positions: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        return gather_rows(y.flatten(2), self.positions).view(*self.positions.shape, *y.shape[2:])


def beside(pick: Pick, *ys: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """ys, and what is picked of each: for what is used whole and in part, so that its gradients meet in one pass."""
    if not isinstance(pick, At):
        return ys, [pick(y) for y in ys]

    def shaped(some: Sequence[Tensor]) -> list[Tensor]:
        return [each.unflatten(2, y.shape[2:]) for each, y in zip(some, ys, strict=True)]

    kept, rows = kept_rows(pick.positions, *(y.flatten(2) for y in ys))
    return shaped(kept), shaped(rows)


class ReadoutMixer(RecurrentMixer):
    """A RecurrentMixer that ends in operations on each position alone: in a last layer, on those that are asked only.

    Subclasses call `pick` on all that these operations take.
    """

    def mix(self, x: Tensor, state: State, return_state: bool, pick: Pick = everywhere) -> tuple[Tensor, State]:
        raise NotImplementedError

    def forward_at(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.mix(x, None, False, At(positions))[0]
