"""A mixer of your own, in one file: copy it, give the class and the name your own, change what it computes.

    zoo check experiments/my_mixer.py:MinimalGRU      does it keep the contract? (seconds)
    zoo sweep SWEEP.yaml --plugin experiments/my_mixer.py

where the sweep names it like any other: `layers: [gated_conv, {mixer: my_gru, expand: [1, 2, 4]}]`.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from zoo import LayerInfo, Mixer, register_mixer


@register_mixer("my_gru")
class MinimalGRU(Mixer):
    """h_t = (1 - z_t) h_{t-1} + z_t W_h x_t, z_t = sigmoid(W_z x_t), y_t = W_o (h_t silu(W_g x_t)).

    A GRU whose gates do not see the state, so that it can be computed in parallel (arXiv 2410.01201, section 3.1).
    """

    class Config(Mixer.Config):  # each field is an axis that a sweep can vary; unknown keys are refused
        expand: int = Field(1, ge=1, description="Width of the state, in units of d_model: the dial for its size.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        self.width = config.expand * layer.d_model
        self.inp = nn.Linear(layer.d_model, 3 * self.width)
        self.out = nn.Linear(self.width, layer.d_model)

    def forward(self, x: Tensor) -> Tensor:  # the parallel form, which is trained: x (B, T, D) -> y (B, T, D)
        return self.prefill(x)[0]

    def prefill(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value, z, gate = self.inp(x).chunk(3, dim=-1)
        keep, h = 1 - z.sigmoid(), z.sigmoid() * value
        if state is not None:  # what came before enters with the first token
            h = h + pad((keep[:, 0] * state)[:, None], (0, 0, 0, x.shape[1] - 1))
        reach = 1  # after each round h_t has absorbed the `reach` tokens up to t: T tokens take log2(T) rounds
        while reach < x.shape[1]:
            h = h + keep * pad(h, (0, 0, reach, 0))[:, : x.shape[1]]
            keep = keep * pad(keep, (0, 0, reach, 0))[:, : x.shape[1]]
            reach *= 2
        return self.out(h * silu(gate)), h[:, -1]

    def init_state(self, batch_size: int) -> Tensor:  # all that is carried from token to token; its size is measured
        return self.out.weight.new_zeros(batch_size, self.width)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:  # the recurrent form: x_t (B, D) -> y_t (B, D)
        value, z, gate = self.inp(x_t).chunk(3, dim=-1)
        h = state + z.sigmoid() * (value - state)
        return self.out(h * silu(gate)), h
