"""Hyena as the published MQAR runs trained it: what the reproduction's difference comes from.

    zoo sweep experiments/published_hyena.yaml --plugin experiments/published_hyena.py

Their code leaves the features of the filter's positions to AdamW, at the learning rate of everything else, and draws
every linear map from N(0, .02^2). The paper's code gives the positions a learning rate of 1e-5 and keeps torch's maps.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import register_mixer
from zoo.mixers.base import LayerInfo
from zoo.mixers.hyena import Hyena, HyenaFilter


class TrainedFilter(HyenaFilter):
    """HyenaFilter in plain torch: its fused op has no gradient of the positions."""

    def forward(self, length: int) -> Tensor:
        with torch.autocast(self.positions.device.type, enabled=False):
            h = self.positions[:length]
            for layer in self.hidden:
                h = torch.sin(self.frequency * layer(h))
            return (F.linear(h, self.out.weight) * self.window[:length]).T


@register_mixer("published_hyena")
class PublishedHyena(Hyena):
    """Hyena with trained features of the positions and small linear maps, each of the two by itself if asked."""

    class Config(Hyena.Config):
        train_positions: bool = Field(True, description="Train the features of the positions too.")
        small_init: bool = Field(True, description="Linear maps from N(0, .02^2), biases 0, weight decay on all.")

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        self.filter = TrainedFilter(
            layer.d_model, layer.max_seq_len, config.filter_width, config.filter_bands, config.filter_frequency
        )
        if config.train_positions:
            positions = self.filter.positions
            del self.filter.positions
            self.filter.positions = nn.Parameter(positions)
        if config.small_init:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            # Their rule for what writes to the residual stream; it counts an MLP a layer, which they do not have.
            nn.init.normal_(self.out_proj.weight, std=0.02 / (2 * layer.depth) ** 0.5)
            for parameter in self.filter.parameters():
                parameter._no_weight_decay = False  # type: ignore[attr-defined]
