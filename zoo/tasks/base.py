"""What a task is: a frozen configuration that is a pure function from (seed, split, index) to an example."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from zoo.errors import ConfigError
from zoo.settings import Settings

Split = Literal["train", "validation", "test"]
IGNORE = -100
MOST_TOKENS = 2**18
"""Of an example: a block of longer ones would take more than 4 GiB an array."""
BLOCK = 2048
"""Examples that are drawn at once. Another number gives other examples: raise every task's version with it."""


@dataclass(frozen=True)
class Batch:
    """Examples. Arrays are int64.

    tokens (N, T). positions (N, Q): where an answer is asked, the model having read tokens[:, : position + 1].
    answers (N, Q): the token to answer; -100 pads rows with fewer than Q questions (their position is then 0).
    context_len: how many leading tokens are context rather than question.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    answers: NDArray[np.int64]
    context_len: int

    def __len__(self) -> int:
        return len(self.tokens)


class Task(Settings):
    """Base of every task: a frozen pydantic model that is its own configuration; unknown keys are refused.

    Subclasses define the fields, `length`, `vocabulary`, `slice_name` and `generate`. Bad settings raise ConfigError in
    a validator, before any example is made.
    """

    # A task's own validators say what it takes, also of numbers that are not finite.
    model_config = ConfigDict(allow_inf_nan=True)

    version: ClassVar[int] = 1
    """Raise it with every edit that changes an example: it is part of a trial's key."""

    @property
    def length(self) -> int:
        """T, the number of tokens of every example."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        """Tokens and answers lie in [0, vocabulary)."""
        raise NotImplementedError

    @property
    def slice_name(self) -> str:
        """A short name for tables and figures, such as `T=64 n=4`; settings that differ must give other names."""
        raise NotImplementedError

    def generate(self, n: int, rng: np.random.Generator) -> Batch:
        """`n` examples from `rng`, vectorised; any integer types will do here.

        Called with n = BLOCK only, so that examples do not depend on n.
        """
        raise NotImplementedError

    def describe(self, batch: Batch, i: int) -> str:
        """Example `i` of `batch` as text, for a person to read (`zoo show`). Override it to show what is what."""
        asked = {int(p): int(a) for p, a in zip(batch.positions[i], batch.answers[i], strict=True) if a != IGNORE}
        cells = [
            f"{token}>{asked[t]}" if t in asked else str(token) for t, token in enumerate(batch.tokens[i].tolist())
        ]
        wide = max(map(len, cells))
        context = f"the first {batch.context_len} tokens" if batch.context_len else "none"
        lines = [f"context: {context}; 7>9 asks for an answer at token 7, and 9 is right"]
        for t in range(0, len(cells), 16):
            lines.append(f"{t:>5}  " + " ".join(f"{cell:>{wide}}" for cell in cells[t : t + 16]))
        return "\n".join(lines)

    def information_limit_bits(self, accuracy: float) -> float | None:
        """Fewest bits of state with which a causal model can reach `accuracy`, or None when no bound is known."""
        return None

    def check_length(self) -> None:
        """Raise ConfigError when examples are too long to be drawn."""
        if self.length > MOST_TOKENS:
            raise ConfigError(
                f"{type(self).__name__}: examples of {self.length:,} tokens are too long to be drawn, {BLOCK:,} at "
                f"once; use at most {MOST_TOKENS:,} tokens."
            )

    def sample(self, n: int, seed: int, split: Split, start: int = 0) -> Batch:
        """Examples start .. start + n - 1 of a stream: a pure function of (task, seed, split, index).

        Examples come from blocks of BLOCK, each with a stretch of its own of the Philox stream that is keyed by (task,
        version, seed, split): the same bytes on any machine, in any order, with any number of workers. Splits never
        share a stream.

        Raises ConfigError on an unknown split, a negative n or start, or more than MOST_TOKENS tokens.
        """
        self.check_length()
        if split not in get_args(Split):
            raise ConfigError(f"unknown split {split!r}; use one of {', '.join(get_args(Split))}.")
        if n < 0 or start < 0:
            raise ConfigError(f"n and start must not be negative, got n={n}, start={start}.")
        # A large piece freed, and glibc keeps the memory that a block frees for the next one. Else it goes back to the
        # kernel and is faulted in again for every block, which costs as much as drawing the examples.
        np.empty(2**24, np.uint8)
        key = self._key(seed, split)
        whole: list[NDArray[np.int64]] = []
        for block in range(start // BLOCK, max(start // BLOCK, (start + n - 1) // BLOCK) + 1):
            # A Philox counter has 256 bits: no block can run into the next one's.
            batch = self.generate(BLOCK, np.random.Generator(np.random.Philox(key=key, counter=block << 128)))
            part = (batch.tokens, batch.positions, batch.answers)
            # Copied at once, so that the next block is made in this one's memory, which is in the cache.
            whole = whole or [np.empty((n, *array.shape[1:]), np.int64) for array in part]
            begin, end = max(start, block * BLOCK), min(start + n, (block + 1) * BLOCK)
            for array, rows in zip(whole, part, strict=True):
                rows = rows[begin - block * BLOCK : end - block * BLOCK]
                np.copyto(array[begin - start : end - start], rows, casting="same_kind")
        tokens, positions, answers = whole
        return Batch(tokens, positions, answers, batch.context_len)

    def _key(self, seed: int, split: Split) -> int:
        identity = [type(self).__name__, self.version, self.model_dump(mode="json"), int(seed), split]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
        return int.from_bytes(digest[:16], "little")


def equivocation_bits(choices: int, error: float) -> float:
    """The most that can be unknown of one of `choices` when a guess of it is wrong with probability `error`.

    Fano's inequality: h2(e) + e log2(choices - 1), which grows up to log2(choices) at blind guessing.
    Raises ConfigError when `error` is no probability.
    """
    if not 0 <= error <= 1:
        raise ConfigError(f"accuracy {1 - error:g} is not in [0, 1].")
    if error >= (choices - 1) / choices:
        return math.log2(choices)
    entropy = -sum(p * math.log2(p) for p in (error, 1 - error) if p > 0)
    return entropy + error * math.log2(max(choices - 1, 1))
