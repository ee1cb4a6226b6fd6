"""What a sequence mixer is: a parallel form to train with, and a recurrent form whose state is all its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, ConformanceError
from zoo.settings import Settings
from zoo.state import State


class MixerConfig(Settings):
    """Base of every mixer's `Config`: frozen, unknown keys refused. Each field is an axis that a sweep can vary."""


@dataclass(frozen=True)
class LayerInfo:
    """Where a mixer stands: what it is told by the model rather than by its own `Config`.

    d_model: channels of the residual stream. index, depth: this layer's number (from 0) and how many there are.
    max_seq_len: the longest sequence the model will see (implicit filters are defined over it). rotary: the model's
    positions are rotary, so a mixer with queries and keys rotates them.
    """

    d_model: int
    index: int = 0
    depth: int = 1
    max_seq_len: int = 2048
    rotary: bool = False


class Mixer(nn.Module):
    """A causal map from x (B, T, D) to y (B, T, D), in a parallel and in a recurrent form that compute the same.

    Subclasses define a nested `Config`, `forward`, `init_state` and `step`; `prefill` has a slow default. Nothing but
    the state may carry memory from one position to the next: no buffers, no attributes, no global.
    Initialise parameters in `__init__`, from torch's default generator: the model seeds it.

    Raises ConformanceError when one of the three is not defined: without `step` a trial would end after its training.
    """

    class Config(MixerConfig):
        """No options."""

    version: ClassVar[int] = 1
    """Raise it with every edit that changes results: it is part of a trial's key."""

    config: MixerConfig
    layer: LayerInfo

    def __init__(self, config: MixerConfig, layer: LayerInfo) -> None:
        missing = [
            name for name in ("forward", "init_state", "step") if getattr(type(self), name) is getattr(Mixer, name)
        ]
        if missing:
            raise ConformanceError(
                f"{type(self).__name__} does not define {' and '.join(missing)}; a mixer needs its parallel form, "
                "forward(x), and its recurrent form, init_state(batch_size) and step(x_t, state)."
            )
        super().__init__()
        self.config = config
        self.layer = layer

    @property
    def state_horizon(self) -> int | None:
        """Tokens after which the state no longer grows: 0 = constant from the start, None = it grows with T."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """The parallel form: x (B, T, D) -> y (B, T, D), y_t a function of x_1..x_t only."""
        raise NotImplementedError

    def forward_at(self, x: Tensor, positions: Tensor) -> Tensor | None:
        """`forward(x)` at positions (B, Q) alone, (B, Q, D), where that costs less than all of it; else None.

        Of the last layer a model needs no more. A mixer that defines only `forward` is as right.
        """
        return None

    def init_state(self, batch_size: int) -> State:
        """The state before the first token, on the parameters' device: tensors whose first axis is `batch_size`."""
        raise NotImplementedError

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """The recurrent form: x_t (B, D), state -> y_t (B, D), the next state. The argument is left as it was."""
        raise NotImplementedError

    def reserve(self, batch_size: int, tokens: int) -> State:
        """`init_state`, but with zeros in place of all that `tokens` tokens will add.

        A mixer whose state grows may define it, along with `step_at`: as no shape then changes, a GPU can replay steps.
        """
        return self.init_state(batch_size)

    def step_at(self, x_t: Tensor, state: State, position: Tensor) -> tuple[Tensor, State]:
        """`step` with a state of `reserve`, in which `position` (1,) tokens are."""
        return self.step(x_t, state)

    def prefill(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """x (B, T, D), the state before it (None: the initial one) -> y (B, T, D), the state after it.

        This default steps token by token; a mixer with a parallel form that gives the state overrides it.
        """
        if state is None:
            state = self.init_state(x.shape[0])
        outputs = []
        for t in range(x.shape[1]):
            y_t, state = self.step(x[:, t], state)
            outputs.append(y_t)
        return torch.stack(outputs, dim=1), state


def head_dim(d_model: int, num_heads: int, what: str = "d_model") -> int:
    """d_model // num_heads. Raises ConfigError when heads do not divide it."""
    if num_heads < 1 or d_model % num_heads:
        allowed = [h for h in range(1, d_model + 1) if d_model % h == 0]
        raise ConfigError(
            f"{what} {d_model} is not divisible by num_heads {num_heads}; use one of {allowed} heads, or another "
            f"{what}."
        )
    return d_model // num_heads
