"""DeltaNet and H3 in the blocks of the published MQAR runs: what differences of the reproduction come from.

    zoo sweep experiments/published_block.yaml --plugin experiments/published_block.py

Their gated convolution adds its input, which is normed, to its output; their block adds norm(x) to x after the mixer
(`mlp: {activation: identity}`, which they write as an MLP that is the identity); and they draw all linear maps from
N(0, .02^2). Their dropout of .1 after the embedding is not here.
"""

from __future__ import annotations

from torch import Tensor, nn

from zoo import register_mixer
from zoo.mixers.base import LayerInfo
from zoo.mixers.delta_net import DeltaNet
from zoo.mixers.gated_conv import GatedConv, GatedConvState
from zoo.mixers.h3 import H3


def small_maps(module: nn.Module) -> None:
    """Linear maps from N(0, .02^2), biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@register_mixer("published_gated_conv")
class PublishedGatedConv(GatedConv):
    """y_t = x_t + (P x_t + b_1) * (sum_{j < W} h_j * x_{t-j} + b_2)."""

    def mix(self, x: Tensor, state: GatedConvState | None, return_state: bool) -> tuple[Tensor, GatedConvState | None]:
        y, state = super().mix(x, state, return_state)
        return x + y, state


@register_mixer("published_delta_net")
class PublishedDeltaNet(DeltaNet):
    """DeltaNet with small linear maps."""

    def __init__(self, config: DeltaNet.Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        small_maps(self)


@register_mixer("published_h3")
class PublishedH3(H3):
    """H3 with small linear maps; the one that writes to the residual stream smaller still, in two layers."""

    def __init__(self, config: H3.Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        small_maps(self)
        nn.init.normal_(self.out_proj.weight, std=0.02 / (2 * layer.depth) ** 0.5)
