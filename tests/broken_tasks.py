"""A sound task, and tasks that each break one part of the contract: what the conformance checks must find.

torch is imported where it is used: other interpreters load this module, and torch takes seconds.
"""

from __future__ import annotations

import copy
import random
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, PrivateAttr, model_serializer

from zoo.tasks import Batch, Task
from zoo.tasks.draw import uniform


class Sound(Task):
    """Random tokens; the first is asked for at the last, and in half of the examples the second before that."""

    seq_len: int = Field(default=12, ge=4)
    vocab_size: int = Field(default=500, gt=0)

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
        tokens = uniform(rng, self.vocab_size, (n, self.seq_len)).astype(np.int64)
        twice = uniform(rng, 2, (n,)) == 1
        positions = np.stack([np.full(n, self.seq_len - 1), np.where(twice, self.seq_len - 2, 0)], axis=1)
        answers = np.stack([tokens[:, 0], np.where(twice, tokens[:, 1], -100)], axis=1)
        return Batch(tokens, positions, answers, 2)


class Edited(Sound):
    """A sound batch, with `edit` applied to it."""

    def generate(self, n: int, rng: np.random.Generator) -> Batch:
        batch = super().generate(n, rng)
        fields = {"tokens": batch.tokens, "positions": batch.positions, "answers": batch.answers, "context_len": 2}
        self.edit(fields)
        return Batch(**fields)

    def edit(self, fields: dict[str, Any]) -> None:
        raise NotImplementedError


class FractionalTokens(Edited):
    def edit(self, fields):
        fields["tokens"] = fields["tokens"] + 0.25


class NarrowTokens(Sound):
    def sample(self, n, seed, split, start=0):
        batch = super().sample(n, seed, split, start)
        return Batch(batch.tokens.astype(np.int32), batch.positions, batch.answers, batch.context_len)


class TorchAnswers(Sound):
    def sample(self, n, seed, split, start=0):
        import torch

        batch = super().sample(n, seed, split, start)
        return Batch(batch.tokens, batch.positions, torch.from_numpy(batch.answers), batch.context_len)


class OneTokenMore(Edited):
    def edit(self, fields):
        fields["tokens"] = np.concatenate([fields["tokens"], fields["tokens"][:, :1]], axis=1)


class FewerPositions(Edited):
    def edit(self, fields):
        fields["positions"] = fields["positions"][:, :1]


class TokenTooLarge(Edited):
    def edit(self, fields):
        fields["tokens"][7, 3] = self.vocab_size


class NegativeAnswer(Edited):
    def edit(self, fields):
        fields["answers"][1023, 0] = -1


class PositionTooFar(Edited):
    def edit(self, fields):
        fields["positions"][1000, 0] = self.seq_len


class PadsElsewhere(Edited):
    def edit(self, fields):
        fields["positions"][fields["answers"] == -100] = self.seq_len - 2


class AsksTwice(Edited):
    def edit(self, fields):
        fields["positions"][:] = self.seq_len - 1
        fields["answers"][:, 1] = fields["answers"][:, 0]


class SometimesSilent(Edited):
    def edit(self, fields):
        fields["answers"][1001:1003] = -100
        fields["positions"][1001:1003] = 0


class AsksInContext(Edited):
    def edit(self, fields):
        fields["context_len"] = self.seq_len


class ContextTooLong(Edited):
    def edit(self, fields):
        fields["context_len"] = self.seq_len + 1


class ShowsTheAnswer(Edited):
    """The answer stands where it is asked."""

    def edit(self, fields):
        fields["tokens"] = fields["tokens"].copy()
        np.put_along_axis(fields["tokens"], fields["positions"], np.maximum(fields["answers"], 0), axis=1)


class FreshEntropy(Sound):
    def generate(self, n, rng):
        return super().generate(n, np.random.Generator(np.random.Philox()))


class CountsCalls(Edited):
    calls: ClassVar[list[int]] = []

    def edit(self, fields):
        self.calls.append(1)
        fields["tokens"][:, 4] = len(self.calls) % self.vocab_size


class DependsOnN(Sound):
    def sample(self, n, seed, split, start=0):
        return self.generate(n, np.random.Generator(np.random.Philox(key=self._key(seed, split) + start)))


class DependsOnHash(Edited):
    def edit(self, fields):
        fields["tokens"][:, 4] = hash("the same in one process") % self.vocab_size


class IgnoresSplit(Sound):
    def _key(self, seed, split):
        return super()._key(seed, "train")


class IgnoresSeed(Sound):
    def _key(self, seed, split):
        return super()._key(0, split)


class TestIsLaterTraining(Sound):
    __test__ = False

    def sample(self, n, seed, split, start=0):
        return super().sample(n, seed, "train", start + 100 * ("train", "validation", "test").index(split))


class DrawsFromNumpy(Edited):
    def edit(self, fields):
        np.random.rand()


class DrawsFromTorch(Edited):
    def edit(self, fields):
        import torch

        torch.rand(1)


class DrawsFromRandom(Edited):
    def edit(self, fields):
        random.random()


class ReadsNumpy(Edited):
    def edit(self, fields):
        same = np.random.RandomState()
        same.set_state(np.random.get_state())
        fields["tokens"][:, 4] = same.randint(self.vocab_size)


class TakesAnyKey(Sound):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Changeable(Sound):
    model_config = ConfigDict(frozen=False, extra="forbid")


class ForgetsASetting(Sound):
    seq_len: int = 14

    @model_serializer
    def _without_seq_len(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}


class HoldsALambda(Sound):
    _answer: Any = PrivateAttr(default=lambda tokens: tokens)


class PicklesItsDefaults(Sound):
    def __reduce__(self):
        return type(self), ()


class NamesTooLittle(Sound):
    @property
    def slice_name(self) -> str:
        return f"T={self.seq_len}"


class NegativeLimit(Sound):
    def information_limit_bits(self, accuracy):
        return 10 * accuracy - 1


class FallingLimit(Sound):
    def information_limit_bits(self, accuracy):
        return 5 - 4 * accuracy


class LimitWithHoles(Sound):
    def information_limit_bits(self, accuracy):
        return None if accuracy == 0.5 else accuracy


class ShowsNothing(Sound):
    def describe(self, batch, i):
        return " "


class ShowsOnlyTheFirst(Sound):
    def describe(self, batch, i):
        return super().describe(batch, 0)


class CannotSample(Sound):
    def generate(self, n, rng):
        return copy.copy(1 / 0)
