"""AdamW (arXiv 1711.05101) for a pack: for members one by one on one long vector each, for a batch on its stacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from zoo.config import OptimizerConfig
from zoo.kernels.adamw import adamw, bias_corrections
from zoo.pack import Pack

EPS = 1e-8

Moments = dict[str, tuple[Tensor, Tensor]]
"""Of one member, by parameter: the running means of its gradient and of the gradient's square."""


class PackOptimizer(Protocol):
    def advance(self) -> Tensor:
        """Count one step more; what `step` is to know of the number."""

    def step(self, rates: Tensor, number: Tensor) -> None:
        """Update every member by the gradients in its model; rates (members,) are the learning rates."""


def decayed(model: nn.Module) -> set[str]:
    """The parameters with weight decay: matrices, but none that a mixer exempts with `_no_weight_decay`."""
    return {name for name, p in model.named_parameters() if p.dim() >= 2 and not getattr(p, "_no_weight_decay", False)}


class OneByOne:
    """Each member by itself. Its parameters lie end to end in memory: a few long operations, not many short ones.

    The moments stay in `moments`, for the next pack to take up.
    """

    def __init__(
        self, pack: Pack, configs: Sequence[OptimizerConfig], moments: Sequence[Moments], steps_done: int
    ) -> None:
        self.pack = pack
        self.betas, self.clip = configs[0].betas, configs[0].clip
        self.count = torch.tensor(float(steps_done), device=pack.parameters[0][0].device)
        self.members = [
            _Vectors(model, config.weight_decay, of_member)
            for model, config, of_member in zip(pack.models, configs, moments, strict=True)
        ]

    def advance(self) -> Tensor:
        self.count += 1
        return self.count

    @torch.no_grad()
    def step(self, rates: Tensor, number: Tensor) -> None:
        for rate, member, gradients in zip(rates, self.members, self.pack.gradient_lists, strict=True):
            gradient = torch.cat([gradients[at].flatten() for at in member.order])
            if self.clip is not None:
                gradient.mul_((self.clip / (gradient.norm() + 1e-6)).clamp(max=1.0))
            for part, decay in member.parts:
                # What torch.optim.AdamW(fused=True) calls, without a dozen operations' worth of Python around it.
                torch._fused_adamw_(
                    [member.value[part]], [gradient[part]], [member.mean[part]], [member.square[part]], [],
                    [number], lr=rate, beta1=self.betas[0], beta2=self.betas[1], weight_decay=decay, eps=EPS,
                    amsgrad=False, maximize=False,
                )  # fmt: skip


class _Vectors:
    """A model's parameters and their moments as vectors (N,), those with weight decay first.

    order: the parameters' indices, as they stand there. parts: the elements with and without decay, and the decay.
    """

    def __init__(self, model: nn.Module, weight_decay: float, moments: Moments) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        with_decay = decayed(model)
        self.order = sorted(range(len(named)), key=lambda i: named[i][0] not in with_decay)
        zeros = [torch.zeros_like(p, requires_grad=False) for _, p in named]
        before = [moments.get(name, (zero, zero)) for (name, _), zero in zip(named, zeros, strict=True)]
        self.value, self.mean, self.square = (
            torch.cat([tensors[i].flatten() for i in self.order])
            for tensors in ([p.detach() for _, p in named], [m for m, _ in before], [s for _, s in before])
        )
        end = sum(p.numel() for name, p in named if name in with_decay)
        self.parts = [(slice(end), weight_decay), (slice(end, None), 0.0)]
        start = 0
        for name, p in (named[i] for i in self.order):
            part = slice(start, start := start + p.numel())
            # The model lives on, in the vector's memory.
            p.data, mean, square = (x[part].view_as(p) for x in (self.value, self.mean, self.square))
            moments[name] = (mean, square)


class Stacked:
    """All members at once. Their moments stay in `moments`, rows of the stacks here, for the next pack to take up."""

    def __init__(
        self, pack: Pack, configs: Sequence[OptimizerConfig], moments: Sequence[Moments], steps_done: int
    ) -> None:
        self.pack = pack
        self.betas, self.clip = configs[0].betas, configs[0].clip
        device = next(iter(pack.stacks.values())).device
        self.decays = torch.tensor([config.weight_decay for config in configs], device=device)
        with_decay = decayed(pack.models[0])
        self.decayed = [name in with_decay for name in pack.stacks]
        self.count = torch.full((1,), steps_done, dtype=torch.float64, device=device)
        self.log_betas = torch.tensor(self.betas, dtype=torch.float64, device=device).log()
        self.means: list[Tensor] = []
        self.squares: list[Tensor] = []
        for name, stack in pack.stacks.items():
            before = [m.get(name) or (torch.zeros_like(stack[0]), torch.zeros_like(stack[0])) for m in moments]
            mean, square = (torch.stack(rows).detach() for rows in zip(*before, strict=True))
            self.means.append(mean)
            self.squares.append(square)
            for i, of_member in enumerate(moments):
                of_member[name] = (mean[i], square[i])

    def advance(self) -> Tensor:
        self.count += 1
        return bias_corrections(self.log_betas, self.count)

    def step(self, rates: Tensor, number: Tensor) -> None:
        stacks, gradients = list(self.pack.stacks.values()), list(self.pack.gradient_stacks.values())
        scale = None
        if self.clip is not None:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
            scale = (self.clip / (norms + 1e-6)).clamp(max=1.0)
        adamw(
            stacks, gradients, self.means, self.squares, self.decayed, rates, self.decays, number,
            scale, betas=self.betas, eps=EPS,
        )  # fmt: skip
