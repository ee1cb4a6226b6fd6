"""Induction: what followed this token when it was last seen?"""

from __future__ import annotations

import numpy as np
from pydantic import model_validator

from zoo import Batch, Task


class Induction(Task):
    """Random tokens, among them the trigger 0 once; it comes again at the end: answer what followed it.

    The induction-head task of arXiv 2212.14052, section 3.1. Tokens are drawn from [1, vocab_size) with replacement,
    the trigger's first place from all that leave room for an answer.
    """

    seq_len: int = 32
    vocab_size: int = 64

    @model_validator(mode="after")
    def _fits(self) -> Induction:
        if self.seq_len < 3:
            raise ValueError(f"seq_len {self.seq_len} is too short for trigger, answer and trigger; use 3 or more")
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size {self.vocab_size} leaves no choice of answers; use 3 or more")
        return self

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
        tokens = rng.integers(1, self.vocab_size, (n, self.seq_len))
        rows, trigger = np.arange(n), rng.integers(0, self.seq_len - 2, n)
        tokens[rows, trigger] = tokens[:, -1] = 0
        last = np.full((n, 1), self.seq_len - 1)
        return Batch(tokens, last, tokens[rows, trigger + 1][:, None], self.seq_len - 1)
