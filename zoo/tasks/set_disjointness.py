"""Set disjointness (SD)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from zoo.errors import ConfigError
from zoo.tasks.base import Batch, Task, equivocation_bits
from zoo.tasks.draw import distinct, uniform

SPECIAL = 4
"""Tokens 0 to 3 are no set's: 1 opens the first set, 2 the second, 3 asks; 0 is kept free, as published."""


class SetDisjointness(Task):
    """Set disjointness: two sets that share one token; answer that token after both.

    Tokens: `1 A 2 B 3`, the part before the 3 `num_passes` times (JRT-Prompt), with B before A when first = "b". The
    answer is asked at the 3.

    For each example the vocabulary is split afresh into a half for A and a half for B, the sets are drawn from them,
    and a random slot of B is overwritten with a random element of A. Of the halves only the sets are ever seen, and
    they are |A| + |B| different tokens of [4, V) in random order: so that is how they are drawn. (Were the halves
    fixed, the answer would be the one token of B that belongs to A's half, and no memory would be needed.)

    Source: arXiv 2407.05483, section 3. Sizes (a, b) with first = "b" have the distribution of (b, a) with first = "a".
    """

    size_a: int = Field(default=4, description="|A|, tokens.")
    size_b: int = Field(default=16, description="|B|, tokens.")
    first: Literal["a", "b"] = Field(default="a", description="Which set is read first.")
    vocab_size: int = Field(default=2048, description="V; 4 of them are special.")
    num_passes: int = Field(default=1, description="How many times both sets are given; 2 is JRT-Prompt.")

    @model_validator(mode="after")
    def _fits(self) -> SetDisjointness:
        for name in ("size_a", "size_b", "num_passes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"set_disjointness: {name} must be at least 1, got {getattr(self, name)}.")
        needed = self.size_a + self.size_b + SPECIAL
        if not needed <= self.vocab_size <= 2**31:
            raise ConfigError(
                f"set_disjointness: vocab_size {self.vocab_size} is not in [{needed}, 2^31]: the sets take "
                f"{self.size_a} + {self.size_b} different tokens, and {SPECIAL} are special; use vocab_size >= "
                f"{needed}, or smaller sets."
            )
        return self

    @property
    def length(self) -> int:
        return self.num_passes * (self.size_a + self.size_b + 2) + 1

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    @property
    def slice_name(self) -> str:
        return f"A={self.size_a} B={self.size_b}" + "".join(
            f" {text}"
            for text, shown in (
                ("B first", self.first == "b"),
                (f"V={self.vocab_size}", self.vocab_size != 2048),
                (f"passes={self.num_passes}", self.num_passes > 1),
            )
            if shown
        )

    def generate(self, n: int, rng: np.random.Generator) -> Batch:
        sets = distinct(rng, SPECIAL, self.vocab_size, n, self.size_a + self.size_b)
        a, b = sets[:, : self.size_a], sets[:, self.size_a :]
        row = np.arange(n)
        shared = a[row, uniform(rng, self.size_a, (n,))]
        b[row, uniform(rng, self.size_b, (n,))] = shared

        first, second = (a, b) if self.first == "a" else (b, a)
        one, two, ask = (np.full((n, 1), token, sets.dtype) for token in (1, 2, 3))
        tokens = np.concatenate([one, first, two, second] * self.num_passes + [ask], axis=1)
        return Batch(tokens, np.full((n, 1), self.length - 1), shared[:, None], self.length - 1)

    def information_limit_bits(self, accuracy: float) -> float:
        """The state after the first set F (f tokens), before the second, G (g tokens), all out of U = V - 4.

        sum over i = 1 .. f of max(0, log2 g - h2(e) - e log2(g - 1) - c_i), e = 1 - accuracy,
        c_i = log2[C(U - i, f - i) / C(U - i - g + 1, f - i)].

        Take F's tokens x_1 .. x_f in random order, and a G that shares x_i. Given x_1 .. x_(i-1) and G, x_i is uniform
        over G and the state S answers it, so by Fano's inequality S tells the first terms of it. At most c_i bits of
        that come from G, which tells that the later x are elsewhere: I(S; x_i | x_<i) is at least the i-th term, and
        S holds their sum. With more than one pass the last reading of G is preceded by another: only the term without
        c_i is left, once.
        """
        f, g = (self.size_a, self.size_b) if self.first == "a" else (self.size_b, self.size_a)
        found = math.log2(g) - equivocation_bits(g, 1 - accuracy)
        if self.num_passes > 1:
            return found
        rest = self.vocab_size - SPECIAL - f
        # C(U - i, f - i) / C(U - i - g + 1, f - i) is a product over the f - i later tokens; U - f = rest.
        total, elsewhere = found, 0.0
        for later in range(1, f):
            elsewhere += math.log2((rest + later) / (rest + later - g + 1))
            total += max(0.0, found - elsewhere)
        return total

    def describe(self, batch: Batch, i: int) -> str:
        tokens, answer = batch.tokens[i].tolist(), int(batch.answers[i, 0])
        wide = len(str(self.vocab_size - 1))
        lines = []
        for start, end, name in self._spans():
            cells = [f"{'*' if token == answer else ' '}{token:>{wide}}" for token in tokens[start:end]]
            for t in range(0, len(cells), 16):
                lines.append(f"{start + t:>6}  {name if t == 0 else ' '} " + " ".join(cells[t : t + 16]))
        return "\n".join([*lines, f"{len(tokens) - 1:>6}  ? {answer}, the token in both sets, marked *"])

    def _spans(self) -> list[tuple[int, int, str]]:
        sizes = [("A", self.size_a), ("B", self.size_b)][:: 1 if self.first == "a" else -1]
        spans, end = [], 0
        for name, size in sizes * self.num_passes:
            spans.append((end + 1, end + 1 + size, name))
            end += 1 + size
        return spans
