"""Multi-query associative recall (MQAR)."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field, model_validator

from zoo.errors import ConfigError
from zoo.tasks.base import Batch, Task, equivocation_bits
from zoo.tasks.draw import distinct, power_law_order


class MQAR(Task):
    """Multi-query associative recall: n key-value pairs, then each key once more, to be answered with its value.

    Tokens: k_1 v_1 .. k_n v_n, `num_passes` times, then (T - 2 n num_passes) / 2 slots of two tokens. Keys are drawn
    without replacement from [1, V/2), values from [V/2, V). The queries k_1, k_2, .. in turn take the first token of a
    free slot, slot i = 1, 2, .. with a chance that goes as i^(power_a - 1). The answer to k_j, asked at the query's
    own position, is v_j; column j of `positions` and `answers` belongs to pair j.

    The rest is filler: token 0, or independent random tokens of the whole vocabulary. The published generator lets
    random filler repeat a key of the example, with another token after it; here filler is never one of its keys.

    Source: arXiv 2312.04927, section 4 and appendix E; random filler from arXiv 2402.18668.
    """

    seq_len: int = Field(default=64, description="T, tokens of an example; even.")
    num_pairs: int = Field(default=4, description="n, key-value pairs; every one is asked once.")
    vocab_size: int = Field(default=8192, description="V; half are keys, half values.")
    power_a: float = Field(default=0.01, description="Slot i has weight i^(power_a - 1); 1 is uniform.")
    random_filler: bool = Field(default=False, description="Filler: random tokens (as BASED has it), not token 0.")
    num_passes: int = Field(default=1, description="How many times the pairs are given.")

    @model_validator(mode="after")
    def _fits(self) -> MQAR:
        context, queries = 2 * self.num_pairs * self.num_passes, 2 * self.num_pairs
        for name in ("num_pairs", "num_passes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mqar: {name} must be at least 1, got {getattr(self, name)}.")
        if self.seq_len % 2:
            raise ConfigError(
                f"mqar: seq_len {self.seq_len} is odd; pairs and query slots are two tokens wide, so use "
                f"{self.seq_len - 1} or {self.seq_len + 1}."
            )
        if context + queries > self.seq_len:
            most = self.seq_len // (2 * self.num_passes + 2)
            remedy = f"num_pairs <= {most} or " if most > 0 else ""
            raise ConfigError(
                f"mqar: num_pairs {self.num_pairs} is too large for seq_len {self.seq_len}: the context takes "
                f"{context} tokens and the queries {queries}; use {remedy}seq_len >= {context + queries}."
            )
        if self.vocab_size % 2 or not 4 <= self.vocab_size <= 2**31:
            raise ConfigError(
                f"mqar: vocab_size {self.vocab_size} must be even (half keys, half values) and in [4, 2^31]; "
                "the published one is 8192."
            )
        if self.vocab_size // 2 - 1 < self.num_pairs:
            raise ConfigError(
                f"mqar: vocab_size {self.vocab_size} is too small: it holds {self.vocab_size // 2 - 1} keys for "
                f"num_pairs {self.num_pairs}; use vocab_size >= {2 * self.num_pairs + 2}."
            )
        if not 0 < self.power_a <= 10:
            raise ConfigError(f"mqar: power_a {self.power_a} must be in (0, 10]; 0.01 is published, 1 is uniform.")
        return self

    @property
    def length(self) -> int:
        return self.seq_len

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    @property
    def slice_name(self) -> str:
        return f"T={self.seq_len} n={self.num_pairs}" + "".join(
            f" {text}"
            for text, shown in (
                (f"V={self.vocab_size}", self.vocab_size != 8192),
                (f"a={self.power_a!r}", self.power_a != 0.01),
                ("random filler", self.random_filler),
                (f"passes={self.num_passes}", self.num_passes > 1),
            )
            if shown
        )

    def generate(self, n: int, rng: np.random.Generator) -> Batch:
        pairs, half = self.num_pairs, self.vocab_size // 2
        context = 2 * pairs * self.num_passes
        slots = (self.seq_len - context) // 2
        fillers = 2 * slots - pairs if self.random_filler else 0
        drawn = distinct(rng, 1, half, n, pairs, fillers, self.vocab_size)
        keys, filler = drawn[:, :pairs], drawn[:, pairs:]
        values = distinct(rng, half, self.vocab_size, n, pairs)
        order = power_law_order(rng, self.power_a - 1, n, slots)
        order *= 2
        order += context

        tokens = np.zeros((n, self.seq_len), drawn.dtype)
        for start in range(0, context, 2 * pairs):
            tokens[:, start : start + 2 * pairs : 2] = keys
            tokens[:, start + 1 : start + 2 * pairs : 2] = values
        positions = order[:, :pairs].copy()
        # One-dimensional indices and one type: numpy is several times faster at them.
        flat, row = tokens.reshape(-1), np.arange(0, n * self.seq_len, self.seq_len)[:, None]
        flat[(positions + row).reshape(-1)] = keys.reshape(-1)
        if self.random_filler:
            tokens[:, context + 1 :: 2] = filler[:, :slots]
            flat[(order[:, pairs:] + row).reshape(-1)] = filler[:, slots:].reshape(-1)
        return Batch(tokens, positions, values, context)

    def information_limit_bits(self, accuracy: float) -> float:
        """log2(M! / (M - n)!) - n (h2(e) + e log2(M - 1)), with M = V/2 values and e = 1 - accuracy.

        After the last pair the model's state and what is still to come, which says nothing of the values, give every
        answer. So the state holds at least what the n answers tell of the n values: all log2(M! / (M - n)!) bits but
        what Fano's inequality lets stay unknown of each, summed (h2 is concave: equal errors are the worst case).
        """
        values, n = self.vocab_size // 2, self.num_pairs
        known = (math.lgamma(values + 1) - math.lgamma(values - n + 1)) / math.log(2)
        return max(0.0, known - n * equivocation_bits(values, 1 - accuracy))

    def describe(self, batch: Batch, i: int) -> str:
        tokens, end = batch.tokens[i].tolist(), batch.context_len
        asked = dict(zip(batch.positions[i].tolist(), batch.answers[i].tolist(), strict=True))
        wide = len(str(self.vocab_size - 1))
        passes = f", the {self.num_pairs} pairs {self.num_passes} times" if self.num_passes > 1 else ""
        pairs = [f"{tokens[t]:>{wide}}={tokens[t + 1]:<{wide}}" for t in range(0, end, 2)]
        rest = [
            f"?{tokens[t]:>{wide}}={asked[t]:<{wide}}" if t in asked else f" {tokens[t] or '.':>{wide}} {'':{wide}}"
            for t in range(end, len(tokens))
        ]
        return "\n".join(
            [f"pairs, key=value (positions 0 to {end - 1}{passes})"]
            + [f"{2 * t:>6}  " + "  ".join(pairs[t : t + 8]) for t in range(0, len(pairs), 8)]
            + [f"queries, ?key=answer, and filler, . for token 0 (positions {end} to {len(tokens) - 1})"]
            + [f"{end + t:>6}  " + " ".join(rest[t : t + 10]).rstrip() for t in range(0, len(rest), 10)]
        )
