"""Hyena: gates around a convolution as long as the sequence, its filter an implicit function of the position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.errors import UnsupportedError
from zoo.kernels.hyena_conv import hyena_conv
from zoo.kernels.implicit_filter import implicit_filter
from zoo.kernels.long_conv import long_conv
from zoo.kernels.projections import projections
from zoo.kernels.short_conv import MAX_WIDTH, short_conv
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import Pick, ReadoutMixer, everywhere


class HyenaState(NamedTuple):
    """conv (B, W-1, 3 D): inputs that the short convolution still needs. inputs (B, t, D): all of the long one's."""

    conv: Tensor
    inputs: Tensor


class HyenaFilter(nn.Module):
    """h_t = MLP(features of t) * exp(-delta t / T_max), one filter a channel (arXiv 2302.10866, section 3.3).

    The MLP's activations are sines with learned frequencies. The deltas are fixed: the windows fall to 1 % within 0.3
    (last channel) to 1.5 (first channel) times T_max. The features are t / T_max and, for each of `bands` frequencies,
    a cosine and a sine.
    """

    positions: Tensor
    window: Tensor

    def __init__(self, d_model: int, max_seq_len: int, width: int, bands: int, frequency: float) -> None:
        super().__init__()
        t = torch.linspace(0, 1, max_seq_len)[:, None]
        angle = 2 * math.pi / max_seq_len * torch.arange(max_seq_len)[:, None] * torch.linspace(1e-4, bands - 1, bands)
        delta = -math.log(0.01) * torch.linspace(1 / 1.5, 1 / 0.3, d_model)
        self.register_buffer("positions", torch.cat([t, angle.cos(), -angle.sin()], dim=1), persistent=False)
        self.register_buffer("window", torch.exp(-t * delta), persistent=False)
        self.hidden: Sequence[nn.Linear] = nn.ModuleList(  # type: ignore[assignment]
            [nn.Linear(1 + 2 * bands, width), nn.Linear(width, width), nn.Linear(width, width)]
        )
        self.out = nn.Linear(width, d_model, bias=False)
        self.frequency = nn.Parameter(torch.full((width,), frequency))
        for parameter in self.parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, length: int) -> Tensor:
        """The first `length` taps (D, length)."""
        first, second, third = self.hidden
        return implicit_filter(
            self.positions, self.window, first.weight, first.bias, second.weight, second.bias, third.weight, third.bias,
            self.frequency, self.out.weight, length,
        )  # fmt: skip


class Hyena(ReadoutMixer):
    """Hyena of order 2 (arXiv 2302.10866, definition 3.1): two gates, two convolutions.

        x1, x2, v = short_conv(W_in u);   y = W_out (x2 * (h conv (x1 * v) + d * x1 * v))

    The filter h is as long as LayerInfo.max_seq_len and no recurrence of fixed size computes it, so a decode keeps
    every input of the long convolution. Initialised as in the official code: d normal, torch's defaults elsewhere.
    """

    class Config(ReadoutMixer.Config):
        conv_width: int = Field(3, ge=1, le=MAX_WIDTH, description="W, taps of the short convolutions.")
        filter_width: int = Field(64, ge=1, description="Hidden units of the filter's MLP.")
        filter_bands: int = Field(
            1,
            ge=1,
            description="Frequencies among the position's features; the published MQAR runs have 1, the LMs 16.",
        )
        filter_frequency: float = Field(1.0, gt=0, description="Initial frequency of the filter's sines.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D = layer.d_model
        self.in_proj = nn.Linear(D, 3 * D)
        bound = config.conv_width**-0.5
        self.conv_weight = nn.Parameter(torch.empty(3 * D, config.conv_width).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(3 * D).uniform_(-bound, bound))
        self.filter = HyenaFilter(
            D, layer.max_seq_len, config.filter_width, config.filter_bands, config.filter_frequency
        )
        self.skip = nn.Parameter(torch.randn(D))
        self.out_proj = nn.Linear(D, D)

    @property
    def state_horizon(self) -> None:
        return None

    def init_state(self, batch_size: int) -> HyenaState:
        D = self.layer.d_model
        return HyenaState(
            self.skip.new_zeros(batch_size, self.config.conv_width - 1, 3 * D), self.skip.new_zeros(batch_size, 0, D)
        )

    def reserve(self, batch_size: int, tokens: int) -> HyenaState:
        self.check_length(tokens)
        conv, _ = self.init_state(batch_size)
        return HyenaState(conv, conv.new_zeros(batch_size, tokens, self.layer.d_model))

    def step_at(self, x_t: Tensor, state: HyenaState, position: Tensor) -> tuple[Tensor, HyenaState]:
        u, x2, conv = self.gated(x_t[:, None], state.conv)
        tokens = torch.arange(state.inputs.shape[1], device=u.device)
        inputs = torch.where((tokens == position)[:, None], u, state.inputs)
        # What is not there yet is 0, whatever its tap.
        taps_TD = self.filter(len(tokens)).index_select(1, (position - tokens).abs()).T
        y = x2[:, 0] * ((inputs * taps_TD).sum(1) + self.skip * u[:, 0])
        return self.out_proj(y), HyenaState(conv, inputs)

    def check_length(self, tokens: int) -> None:
        if tokens > self.layer.max_seq_len:
            raise UnsupportedError(
                f"hyena: a sequence of {tokens} tokens, but its filters are {self.layer.max_seq_len} taps long; "
                f"build it with LayerInfo.max_seq_len of {tokens} or more."
            )

    def gated(self, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x1 * v, x2, and the cache of the short convolutions."""
        y, cache = short_conv(self.in_proj(x), self.conv_weight, self.conv_bias, initial_state=cache)
        assert cache is not None
        x1, x2, v = y.chunk(3, dim=-1)
        return x1 * v, x2, cache

    def mix(
        self, x: Tensor, state: HyenaState | None, return_state: bool, pick: Pick = everywhere
    ) -> tuple[Tensor, HyenaState | None]:
        cache, past = (None, None) if state is None else state
        length = x.shape[1] + (0 if past is None else past.shape[1])
        self.check_length(length)
        if past is None and not return_state:
            weight, bias = self.conv_weight.unflatten(0, (3, -1)), self.conv_bias.unflatten(0, (3, -1))
            x1, x2, v = projections(x, *self.in_proj.weight.chunk(3), biases=self.in_proj.bias.chunk(3))
            y = hyena_conv(x1, x2, v, weight, bias, self.filter(length), self.skip)
            return self.out_proj(pick(y)), None
        u, x2, cache = self.gated(x, cache)
        y = self.out_proj(pick(long_conv(u, self.filter(length), self.skip, x2, past=past)))
        return y, HyenaState(cache, u if past is None else torch.cat([past, u], dim=1))
