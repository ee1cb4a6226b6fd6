"""What a task is: a frozen configuration that is a pure function from (seed, split, index) to an example."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from zoo.errors import ConfigError

Split = Literal["train", "validation", "test"]
IGNORE = -100
BLOCK = 1024


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


class Task(BaseModel):
    """Base of every task: a frozen pydantic model that is its own configuration; unknown keys are refused.

    Subclasses define the fields, `seq_len`, `vocab_size`, `slice_name` and `generate`. Bad settings raise in a
    validator, before any example is made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

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
        """`n` examples from `rng`, vectorised. Called with n = BLOCK only, so that examples do not depend on n."""
        raise NotImplementedError

    def information_limit_bits(self, accuracy: float) -> float | None:
        """Fewest bits of state with which a causal model can reach `accuracy`, or None when no bound is known."""
        return None

    def sample(self, n: int, seed: int, split: Split, start: int = 0) -> Batch:
        """Examples start .. start + n - 1 of a stream: a pure function of (task, seed, split, index).

        Examples come from blocks of BLOCK, each with a Philox stream of its own keyed by (task, version, seed, split,
        block): the same bytes on any machine, in any order, with any number of workers. Splits never share a stream.

        Raises ConfigError on an unknown split or a negative n or start.
        """
        if split not in get_args(Split):
            raise ConfigError(f"unknown split {split!r}; use one of {', '.join(get_args(Split))}.")
        if n < 0 or start < 0:
            raise ConfigError(f"n and start must not be negative, got n={n}, start={start}.")
        first, last = start // BLOCK, max(start // BLOCK, (start + n - 1) // BLOCK)
        blocks = [self.generate(BLOCK, self._stream(seed, split, block)) for block in range(first, last + 1)]
        cut = slice(start - first * BLOCK, start - first * BLOCK + n)
        if len(blocks) == 1:
            whole = blocks[0]
            return Batch(whole.tokens[cut], whole.positions[cut], whole.answers[cut], whole.context_len)
        return Batch(
            np.concatenate([b.tokens for b in blocks])[cut],
            np.concatenate([b.positions for b in blocks])[cut],
            np.concatenate([b.answers for b in blocks])[cut],
            blocks[0].context_len,
        )

    def _stream(self, seed: int, split: Split, block: int) -> np.random.Generator:
        identity = json.dumps(
            [type(self).__name__, self.version, self.model_dump(mode="json"), seed, split, block], sort_keys=True
        )
        digest = hashlib.sha256(identity.encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
