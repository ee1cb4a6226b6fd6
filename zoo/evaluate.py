"""Accuracy by test slice, in the parallel form or through the recurrent state."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from zoo.config import DataConfig, DataEntry
from zoo.decode import decode
from zoo.errors import ConfigError
from zoo.graphs import Pool, Replay
from zoo.model import Model
from zoo.pack import Pack, evaluating
from zoo.record import SliceResult
from zoo.tasks import IGNORE, Split

Through = Literal["parallel", "state"]
Dtype = Literal["float32", "bfloat16"]

# Sequences are judged in batches: few enough tokens at once for a GPU's memory, and for a CPU's caches.
GPU_TOKENS = 1 << 21
CPU_BATCH = 256
# 16 GiB, of one mixture.
_MOST_TOKENS = 2**31


class Slice(NamedTuple):
    """One slice of a mixture as tensors on a device: tokens (N, T), positions and answers (N, Q)."""

    name: str
    tokens: Tensor
    positions: Tensor
    answers: Tensor


def load_slices(entries: Iterable[DataEntry], seed: int, split: Split, device: str | torch.device) -> list[Slice]:
    """The slices of one mixture; entries of the same task settings draw different examples of one stream."""
    slices: list[Slice] = []
    drawn: dict[str, int] = {}
    for entry in entries:
        identity = f"{entry.task} {entry.options.model_dump_json()}"
        start = drawn.get(identity, 0)
        drawn[identity] = start + entry.examples
        batch = entry.options.sample(entry.examples, seed, split, start)
        slices.append(
            Slice(
                entry.options.slice_name,
                torch.from_numpy(batch.tokens).to(torch.int32).to(device),
                torch.from_numpy(batch.positions).to(device),
                torch.from_numpy(batch.answers).to(device),
            )
        )
    return slices


def mean_accuracy(results: Iterable[SliceResult]) -> float:
    """The mean over slices of their accuracies."""
    accuracies = [result.accuracy for result in results]
    return sum(accuracies) / len(accuracies)


def evaluate(model: Model, slices: Sequence[Slice], through: Through = "parallel") -> list[SliceResult]:
    """Accuracy and mean loss of every slice; through="state" decodes token by token, carrying only the state.

    Raises ConfigError on an unknown `through`.
    """
    if through not in get_args(Through):
        raise ConfigError(f"through={through!r} is not allowed; use 'parallel' or 'state'.")
    evaluation = PackEvaluation(Pack([model], batched=False), slices, through=through)
    evaluation.run()
    return evaluation.results()[0]


class PackEvaluation:
    """Accuracy and mean loss of every member of a pack on every slice.

    With `again`, it is run many times: on a GPU as graphs, whose memory is in `pool`.
    """

    def __init__(
        self,
        pack: Pack,
        slices: Sequence[Slice],
        dtype: Dtype = "float32",
        *,
        through: Through = "parallel",
        again: bool = False,
        pool: Pool | None = None,
    ) -> None:
        device = slices[0].tokens.device
        self._pack, self._slices, self._dtype, self._through = pack, slices, dtype, through
        self._losses = torch.zeros(len(slices), len(pack), dtype=torch.float64, device=device)
        self._hits = torch.zeros(len(slices), len(pack), dtype=torch.int64, device=device)
        self._counts = [int((part.answers != IGNORE).sum()) for part in slices]
        this = weakref.proxy(self)
        self._parts: list[Callable[[], object]] = [
            functools.partial(PackEvaluation._judge, this, s) for s in range(len(slices))
        ]
        if again:
            self._parts = [Replay(part, device, rehearse=part, pool=pool) for part in self._parts]

    def run(self) -> None:
        """Start it; a GPU may still be at work when this returns."""
        with evaluating(self._pack.models):
            for part in self._parts:
                part()

    def results(self) -> list[list[SliceResult]]:
        """Of the last run: for each member, the result of every slice."""
        losses, hits = self._losses.cpu(), self._hits.cpu()
        return [
            [
                SliceResult(
                    name=part.name,
                    accuracy=int(hits[s, i]) / self._counts[s],
                    loss=float(losses[s, i]) / self._counts[s],
                    examples=len(part.tokens),
                    answers=self._counts[s],
                )
                for s, part in enumerate(self._slices)
            ]
            for i in range(len(self._pack))
        ]

    def _judge(self, s: int) -> None:
        _, *part = self._slices[s]
        members = len(self._pack)
        on_gpu = part[0].is_cuda
        size = max(1, GPU_TOKENS // (members * part[0].shape[1])) if on_gpu else CPU_BATCH
        function = functools.partial(_answers, through=self._through)
        losses, hits = [], []
        with torch.autocast(part[0].device.type, torch.bfloat16, enabled=self._dtype == "bfloat16"):
            for start in range(0, len(part[0]), size):
                loss, hit = self._pack.call(
                    function, *(x[None, start : start + size].expand(members, -1, -1) for x in part)
                )
                losses.append(loss)
                hits.append(hit)
        self._losses[s] = torch.stack(losses).sum(0)
        self._hits[s] = torch.stack(hits).sum(0)


def _answers(
    model: Model, tokens: Tensor, positions: Tensor, answers: Tensor, through: Through
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and how many answers are right."""
    features = model.features(tokens, positions) if through == "parallel" else decode(model, tokens, positions)
    loss, prediction = model.judge(features, answers)
    return loss.sum(dtype=torch.float64), (prediction == answers.flatten()).sum()


def check_data(data: DataConfig) -> None:
    """Raise ConfigError when examples are too long or too many, or when two slices of one mixture have the same name: a
    table could not tell them apart."""
    for entry in data.entries:
        entry.options.check_length()
    for split, mixture in {"train": data.train, "test": data.test, "validation": data.validation}.items():
        tokens = sum(entry.examples * entry.options.length for entry in mixture)
        if tokens > _MOST_TOKENS:
            raise ConfigError(
                f"data.{split}: {tokens:,} tokens, examples times their length, are more than the {_MOST_TOKENS:,} of "
                "one mixture, which is held in memory; lower the number of examples."
            )
    for mixture in (data.validation, data.test):
        names = [entry.options.slice_name for entry in mixture]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"two slices of a mixture are both called {twice!r}; give each slice once.")
