"""AdamW (arXiv 1711.05101) for a pack: torch's own for members that run one by one, one kernel a stack for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from zoo.config import OptimizerConfig
from zoo.kernels.adamw import adamw, unbiasing
from zoo.model import Model
from zoo.pack import Pack

EPS = 1e-8

Moments = dict[str, tuple[Tensor, Tensor]]
"""Of one member, by parameter: the running means of its gradient and of the gradient's square."""


class PackOptimizer(Protocol):
    def step(self, rates: Tensor) -> None:
        """Update every member by the gradients in its model; rates (members,) are the learning rates."""


def decayed(model: nn.Module) -> set[str]:
    """The parameters with weight decay: matrices, but none that a mixer exempts with `_no_weight_decay`."""
    return {name for name, p in model.named_parameters() if p.dim() >= 2 and not getattr(p, "_no_weight_decay", False)}


def make_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW with decay where `decayed` says so."""
    names = decayed(model)
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in names) == with_decay], "weight_decay": decay}
        for with_decay, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=EPS, fused=True)


class OneByOne:
    """torch's AdamW of each member, which `optimizers` keep from pack to pack."""

    def __init__(self, models: Sequence[Model], optimizers: Sequence[torch.optim.AdamW], clip: float | None) -> None:
        self.models, self.optimizers, self.clip = models, optimizers, clip

    def step(self, rates: Tensor) -> None:
        for model, optimizer, rate in zip(self.models, self.optimizers, rates.tolist(), strict=True):
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


class Stacked:
    """All members at once. Their moments stay in `moments`, rows of the stacks here, for the next pack to take up."""

    def __init__(
        self, pack: Pack, configs: Sequence[OptimizerConfig], moments: Sequence[Moments], steps_done: int
    ) -> None:
        self.pack = pack
        self.betas, self.clip = configs[0].betas, configs[0].clip
        device = next(iter(pack.stacks.values())).device
        decays = torch.tensor([config.weight_decay for config in configs], device=device)
        names = decayed(pack.models[0])
        self.decays = {name: decays if name in names else torch.zeros_like(decays) for name in pack.stacks}
        self.count = torch.full((1,), steps_done, dtype=torch.float64, device=device)
        self.moments: Moments = {}
        for name, stack in pack.stacks.items():
            before = [m.get(name) or (torch.zeros_like(stack[0]), torch.zeros_like(stack[0])) for m in moments]
            mean, square = (torch.stack(rows).detach() for rows in zip(*before, strict=True))
            self.moments[name] = (mean, square)
            for i, of_member in enumerate(moments):
                of_member[name] = (mean[i], square[i])

    def step(self, rates: Tensor) -> None:
        self.count += 1
        unbias = unbiasing(self.betas, self.count)
        gradients = {name: g for name, g in self.pack.gradient_stacks.items() if g is not None}
        scale = None
        if self.clip is not None:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
            scale = (self.clip / (norms + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            adamw(
                self.pack.stacks[name], gradient, *self.moments[name], rates, self.decays[name], unbias, scale,
                betas=self.betas, eps=EPS,
            )  # fmt: skip
