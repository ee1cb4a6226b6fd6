"""A sound mixer, and mixers that each break one part of the contract: what the conformance checks must find."""

from __future__ import annotations

import math
import random
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

from zoo.mixers import LayerInfo, Mixer


class GatedState(NamedTuple):
    h: Tensor
    last: Tensor


class Sound(Mixer):
    """h_t = a_t h_{t-1} + (1 - a_t) (u_t + w u_{t-1}), y_t = out(h_t), with u = inp(x) and a = sigmoid(decay(x))."""

    class Config(Mixer.Config):
        bias: float = Field(default=2.0, description="Added to the logit of the decay.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        d = layer.d_model
        self.inp, self.decay, self.out = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.previous = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.prefill(x)[0]

    def prefill(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        u = self.inp(x)
        h, last = (None, torch.zeros_like(u[:, 0])) if state is None else state
        a, b = self.coefficients(x, u, torch.cat([last[:, None], u[:, :-1]], dim=1))
        if h is not None:
            b = torch.cat([b[:, :1] + a[:, :1] * h[:, None], b[:, 1:]], dim=1)
        for shift in (2**i for i in range(math.ceil(math.log2(x.shape[1])))):
            b = b + a * pad(b, (0, 0, shift, 0))[:, : x.shape[1]]
            a = a * pad(a, (0, 0, shift, 0))[:, : x.shape[1]]
        return self.out(b), GatedState(b[:, -1], u[:, -1])

    def coefficients(self, x: Tensor, u: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.sigmoid(self.decay(x) + self.config.bias)
        return a, (1 - a) * (u + self.previous * previous)

    def init_state(self, batch_size: int) -> Any:
        zeros = self.previous.new_zeros(batch_size, self.layer.d_model)
        return GatedState(zeros, zeros)

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        u = self.inp(x_t)
        a, b = self.coefficients(x_t, u, state.last)
        h = a * state.h + b
        return self.out(h), GatedState(h, u)


def ahead(x: Tensor) -> Tensor:
    """x_{t+1} at t, the last position 0."""
    return pad(x[:, 1:], (0, 0, 0, 1))


class WrongDtype(Sound):
    def forward(self, x):
        return super().forward(x).double() if x.dtype == torch.float32 else super().forward(x)


class NoSingleToken(Sound):
    def forward(self, x):
        return super().forward(x).squeeze(1)


class TableTooShort(Sound):
    """As an implicit filter that is defined over fewer positions than max_seq_len."""

    def forward(self, x):
        return super().forward(x) * x.new_ones(128)[torch.arange(x.shape[1])][:, None]


class LeaksARounding(Sound):
    def forward(self, x):
        return super().forward(x) + 4 * torch.finfo(x.dtype).eps * ahead(x.detach())


class LeaksAGradient(Sound):
    def forward(self, x):
        return super().forward(x) + 1e-7 * (ahead(x) - ahead(x).detach())


class LooksAhead(Sound):
    """As a convolution padded on both sides: output t sees input t + 4."""

    def forward(self, x):
        return super().forward(x) + 0.1 * pad(x[:, 4:], (0, 0, 0, 4))


class LooksAheadLate(Sound):
    """As a parallel form whose second chunk of 128 has lost its mask."""

    def prefill(self, x, state=None):
        y, state = super().prefill(x, state)
        return torch.cat([y[:, :128], y[:, 128:] + 0.1 * ahead(x[:, 128:])], dim=1), state


class StartsElsewhere(Sound):
    """init_state is not the state that prefill starts from."""

    def init_state(self, batch_size):
        zeros, last = super().init_state(batch_size)
        return GatedState(zeros + 0.1, last)


class ForgetsRotation(Sound):
    """With rotary positions the two forms differ."""

    def init_state(self, batch_size):
        zeros, last = super().init_state(batch_size)
        return GatedState(zeros + (0.1 if self.layer.rotary else 0), last)


class Epsilon(Sound):
    """The two forms have another epsilon: nothing that fp32 could show."""

    def init_state(self, batch_size):
        zeros, last = super().init_state(batch_size)
        return GatedState(zeros + 1e-7, last)


class PrefillScalesState(Sound):
    """prefill's state is in units of its own: it continues from itself, step does not."""

    def prefill(self, x, state=None):
        y, (h, last) = super().prefill(x, state and GatedState(state.h / 2, state.last))
        return y, GatedState(h * 2, last)


class PrefillStartsAfresh(Sound):
    def prefill(self, x, state=None):
        return super().prefill(x)


class PrefillDropsLast(Sound):
    """prefill leaves the convolution's cache empty."""

    def prefill(self, x, state=None):
        y, (h, last) = super().prefill(x, state)
        return y, GatedState(h, torch.zeros_like(last))


class AsksTheNext(Sound):
    def forward_at(self, x: Tensor, positions: Tensor) -> Tensor | None:
        after = (positions + 1).clamp(max=x.shape[1] - 1)
        return self(x).gather(1, after[..., None].expand(-1, -1, x.shape[2]))


class UnnamedState(Sound):
    def step(self, x_t, state):
        y_t, state = super().step(x_t, GatedState(*state))
        return y_t, tuple(state)


class BatchLast(Sound):
    """The state is (D, B)."""

    def prefill(self, x, state=None):
        y, state = super().prefill(x, state and GatedState(state.h.T, state.last.T))
        return y, GatedState(state.h.T, state.last.T)

    def init_state(self, batch_size):
        return GatedState(*(t.T for t in super().init_state(batch_size)))

    def step(self, x_t, state):
        y_t, state = super().step(x_t, GatedState(state.h.T, state.last.T))
        return y_t, GatedState(state.h.T, state.last.T)


class RandomConstant(Sound):
    """A random tensor that the saved weights do not hold."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("scale", 1 + torch.rand(layer.d_model), persistent=False)

    def coefficients(self, x, u, previous):
        a, b = super().coefficients(x, u, previous)
        return a, b * self.scale


class KeepsStateForSpeed(Sound):
    """step goes on from the state it left last, whatever state it is given."""

    kept: Tensor | None = None

    def init_state(self, batch_size):
        self.kept = None
        return super().init_state(batch_size)

    def prefill(self, x, state=None):
        self.kept = None
        return super().prefill(x, state)

    def step(self, x_t, state):
        if self.kept is not None and self.kept.shape == state.h.shape:
            state = GatedState(self.kept, state.last)
        y_t, state = super().step(x_t, state)
        self.kept = state.h
        return y_t, state


class HidesLast(Sound):
    """The previous token is kept on the module, not in the state."""

    hidden: Tensor | None = None

    def init_state(self, batch_size):
        state = super().init_state(batch_size)
        self.hidden = state.last
        return (state.h,)

    def prefill(self, x, state=None):
        y, (h, self.hidden) = super().prefill(x, state and GatedState(state[0], self.hidden))
        return y, (h,)

    def step(self, x_t, state):
        y_t, (h, self.hidden) = super().step(x_t, GatedState(state[0], self.hidden))
        return y_t, (h,)


class StepsInPlace(Sound):
    def step(self, x_t, state):
        y_t, (h, last) = super().step(x_t, state)
        return y_t, GatedState(state.h.copy_(h), last)

    def init_state(self, batch_size):
        return GatedState(*(t.clone() for t in super().init_state(batch_size)))


class LoggedState(NamedTuple):
    h: Tensor
    last: Tensor
    log: Tensor


class Grows(Sound):
    """Claims a constant state, and keeps a number a token."""

    def init_state(self, batch_size):
        return LoggedState(*super().init_state(batch_size), self.previous.new_zeros(batch_size, 0))

    def prefill(self, x, state=None):
        y, (h, last) = super().prefill(x, state and GatedState(*state[:2]))
        log = x[..., 0] if state is None else torch.cat([state.log, x[..., 0]], dim=1)
        return y, LoggedState(h, last, log)

    def step(self, x_t, state):
        y_t, (h, last) = super().step(x_t, GatedState(*state[:2]))
        return y_t, LoggedState(h, last, torch.cat([state.log, x_t[:, :1]], dim=1))


class GrowsHonestly(Grows):
    state_horizon = None


class ReservesInVain(GrowsHonestly):
    """step_at forgets all but the log."""

    def reserve(self, batch_size, tokens):
        return self.init_state(batch_size)._replace(log=self.previous.new_zeros(batch_size, tokens))

    def step_at(self, x_t, state, position):
        y_t, _ = self.step(x_t, state)
        return y_t, state._replace(log=state.log.index_copy(1, position, x_t[:, :1]))


class ReservesTooLittle(ReservesInVain):
    def step_at(self, x_t, state, position):
        return self.step(x_t, state)


class GrowsLater(Grows):
    """Claims to be constant after 8 tokens, grows up to 100."""

    state_horizon = 8

    def prefill(self, x, state=None):
        y, state = super().prefill(x, state)
        return y, state._replace(log=state.log[:, -100:])

    def step(self, x_t, state):
        y_t, state = super().step(x_t, state)
        return y_t, state._replace(log=state.log[:, -100:])


class ConstantAfter100(GrowsLater):
    state_horizon = 100


class ClaimsToGrow(Sound):
    state_horizon = None


class MixesBatch(Sound):
    """As a batch norm without running statistics."""

    def coefficients(self, x, u, previous):
        a, b = super().coefficients(x, u, previous)
        return a, b - 0.1 * b.mean(dim=0)


class NeedsContiguous(Sound):
    def forward(self, x):
        return super().forward(x.view(-1).view(x.shape))


class AssumesContiguousGradient(torch.autograd.Function):
    """As a kernel that reads its output's gradient as if it were contiguous."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient if gradient.is_contiguous() else 2 * gradient


class NeedsContiguousGradient(Sound):
    def forward(self, x):
        return AssumesContiguousGradient.apply(super().forward(x))


class UnusedParameter(Sound):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.forgotten = nn.Parameter(torch.zeros(3))


class DetachedParameter(Sound):
    def coefficients(self, x, u, previous):
        a, _ = super().coefficients(x, u, previous)
        return a, (1 - a) * (u + self.previous.detach() * previous)


class InfiniteGradient(Sound):
    """sqrt at 0: the output is right, the gradient is not a number."""

    def forward(self, x):
        return super().forward(x) + torch.sqrt(self.previous - self.previous)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


class GradientOnePercentOff(Sound):
    def coefficients(self, x, u, previous):
        a, b = super().coefficients(x, u, previous)
        return WrongGradient.apply(a), b


class SinglePrecisionState(Sound):
    def init_state(self, batch_size):
        return GatedState(*(t.float() for t in super().init_state(batch_size)))


class SinglePrecisionInside(Sound):
    def coefficients(self, x, u, previous):
        a, b = super().coefficients(x, u, previous)
        return a, b.float().to(b.dtype)


class Dropout(Sound):
    def coefficients(self, x, u, previous):
        a, b = super().coefficients(x, u, previous)
        return a, dropout(b, 0.1, self.training)


class SeedsItself(Sound):
    """Initialised from a generator that the model does not seed."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        nn.init.constant_(self.previous, random.random())


class DrawsNumbers(Sound):
    """Whatever it does with it: the numbers that others draw change."""

    def forward(self, x):
        return super().forward(x) + 0 * torch.rand(())


class Drifts(Sound):
    """A little more with each call, then from the start again."""

    calls = 0

    def forward(self, x):
        self.calls = self.calls % 3 + 1
        return super().forward(x) * (1 + 1e-6 * self.calls)


class TakesAnyKey(Sound):
    class Config(Sound.Config):
        model_config = ConfigDict(extra="ignore")


class ChangeableConfig(Sound):
    class Config(Sound.Config):
        model_config = ConfigDict(frozen=False)


class ForgetsConfig(Sound):
    """Builds with a config of its own."""

    def __init__(self, config, layer):
        super().__init__(type(config)(bias=1.0), layer)


class HoldsALambda(Sound):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.activation = lambda x: x


class LoneLayer(Sound):
    """As an initialisation that depends on index / (depth - 1)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        nn.init.constant_(self.previous, layer.index / (layer.depth - 1))


class NotANumber(Sound):
    def forward(self, x):
        return super().forward(x) * torch.tensor(-1.0, dtype=x.dtype).log()


class OfOneWidth(Sound):
    """A number in the place of layer.d_model."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.out = nn.Linear(16, 16)


class CannotBeBuilt(Sound):
    def __init__(self, config, layer):
        raise RuntimeError("no weights here")


class HasNoRecurrentForm(Mixer):
    def forward(self, x):
        return x


class StepCrashes(Sound):
    counters: ClassVar[list[int]] = []

    def step(self, x_t, state):
        return self.counters[3], state
