"""A plugin for the sweep's tests: a task and a mixer that train in milliseconds, and misbehave on demand."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from zoo import Batch, Mixer, Task, register_mixer, register_task


@register_task("first_token")
class FirstToken(Task):
    """What was the first token?"""

    seq_len: int = 8
    vocab_size: int = 8

    @property
    def length(self) -> int:
        return self.seq_len

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    @property
    def slice_name(self) -> str:
        return f"T={self.seq_len} V={self.vocab_size}"

    def generate(self, n: int, rng: np.random.Generator) -> Batch:
        tokens = rng.integers(0, self.vocab_size, (n, self.seq_len))
        return Batch(tokens, np.full((n, 1), self.seq_len - 1), tokens[:, :1].copy(), self.seq_len - 1)


@register_mixer("running_mean")
class RunningMean(Mixer):
    """h_t = h_{t-1} + W x_t; y_t = h_t / T."""

    class Config(Mixer.Config):
        """behaviour: what goes wrong in `forward` (raise_in_init: before) until the file `cured` exists; exit_once: the
        first time, which makes that file. seconds: that each forward takes."""

        behaviour: Literal["good", "raise", "raise_in_init", "exit", "exit_once", "diverge"] = "good"
        cured: str = ""
        seconds: float = 0.0

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.project = nn.Linear(layer.d_model, layer.d_model)
        if config.behaviour == "raise_in_init":
            raise RuntimeError("this mixer cannot be built")

    def forward(self, x):
        time.sleep(self.config.seconds)
        cured = bool(self.config.cured) and Path(self.config.cured).exists()
        if self.config.behaviour == "raise" and not cured:
            raise RuntimeError("this mixer always raises")
        if self.config.behaviour == "exit_once" and not cured:
            Path(self.config.cured).touch()
        if self.config.behaviour.startswith("exit") and not cured:
            os._exit(7)
        if self.config.behaviour == "diverge":
            return x * float("nan") + self.project(x)
        return torch.cumsum(self.project(x), dim=1) / self.layer.max_seq_len

    def init_state(self, batch_size):
        return self.project.weight.new_zeros(batch_size, self.layer.d_model)

    def step(self, x_t, h):
        h = h + self.project(x_t)
        return h / self.layer.max_seq_len, h
