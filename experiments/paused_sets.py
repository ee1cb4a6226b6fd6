"""Set disjointness with a pause before the question: whether the larger set does better first because the answer is then
one of the last tokens before it.

    zoo sweep experiments/paused_sets.yaml --plugin experiments/paused_sets.py
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from zoo import Batch, register_task
from zoo.tasks.set_disjointness import SetDisjointness


@register_task("paused_sets")
class PausedSets(SetDisjointness):
    """Set disjointness with `pause` times the token 0, which is no set's, between the sets and the 3 that asks."""

    pause: int = Field(default=16, ge=0, le=4096, description="Tokens 0 before the question.")

    @property
    def length(self) -> int:
        return super().length + self.pause

    @property
    def slice_name(self) -> str:
        return super().slice_name + ("" if self.pause == 16 else f" pause={self.pause}")

    def generate(self, n: int, rng: np.random.Generator) -> Batch:
        batch = super().generate(n, rng)
        sets, ask = np.split(batch.tokens, [-1], axis=1)
        tokens = np.concatenate([sets, np.zeros((n, self.pause), sets.dtype), ask], axis=1)
        return Batch(tokens, np.full((n, 1), self.length - 1), batch.answers, self.length - 1)
