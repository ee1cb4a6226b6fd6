"""The training loop: a pack's steps, each without the host, and what is read of them once an epoch."""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.config import OptimizerConfig, Trial
from zoo.evaluate import Dtype, PackEvaluation, Slice, mean_accuracy
from zoo.graphs import Replay, new_pool
from zoo.kernels.streams import join, lane
from zoo.model import Model
from zoo.optimizer import Moments, OneByOne, PackOptimizer, Stacked
from zoo.pack import Pack
from zoo.record import Epoch, SliceResult
from zoo.tasks import IGNORE


@dataclass
class Run:
    """One member's training. message: why it ended, None while it goes on. kept: its parameters at the end."""

    trial: Trial
    model: Model
    moments: Moments = field(default_factory=dict)
    history: list[Epoch] = field(default_factory=list)
    validated: list[SliceResult] = field(default_factory=list)
    steps: int = 0
    message: str | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        return self.message is not None and self.message.startswith("diverged")

    def end(self, message: str) -> None:
        self.message = message
        self.kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def restore(self) -> None:
        """Give the model the parameters that the run ended with: its pack may have gone on without it."""
        for name, parameter in self.model.named_parameters():
            parameter.data = self.kept[name]


class Fit:
    """Trains the runs of one pack, which are at the same epoch."""

    def __init__(self, runs: Sequence[Run], train: Sequence[Slice], validation: Sequence[Slice], batched: bool) -> None:
        self.runs = list(runs)
        self.train = train
        self.settings = runs[0].trial.training
        self.device = runs[0].model.embedding.weight.device
        self.pack = Pack([run.model for run in runs], batched=batched)
        self.sizes = [len(part.tokens) for part in train]
        batch = self.settings.batch_size
        self.steps = [size // batch for size in self.sizes]
        self.loss = functools.partial(mean_loss, dtype=self.settings.dtype)
        zeros, members = functools.partial(torch.zeros, device=self.device), len(runs)
        # What a step reads and writes, in places that stay.
        self.rows = [zeros(steps, members, batch, dtype=torch.int64) for steps in self.steps]
        self.turn = [zeros(1, dtype=torch.int64) for _ in train]
        self.index = zeros(1, dtype=torch.int64)
        self.rates = zeros(sum(self.steps), members)
        self.losses = zeros(sum(self.steps), members)
        settings = [run.trial.optimizer for run in runs]
        optimizer = Stacked if batched else OneByOne
        self.optimizer: PackOptimizer = optimizer(self.pack, settings, [run.moments for run in runs], runs[0].steps)
        pool = new_pool(self.device)
        # Weakly: what a step keeps is freed with the pack, not when the garbage collector finds a cycle.
        this = weakref.proxy(self)
        self.replays = [
            Replay(functools.partial(Fit._step, this, s), self.device, functools.partial(Fit._gradients, this, s), pool)
            for s in range(len(train))
        ]
        self.validation = PackEvaluation(self.pack, validation, self.settings.dtype, again=True, pool=pool)

    @staticmethod
    def memory_of_one(run: Run, train: Sequence[Slice]) -> int:
        """Bytes of GPU memory that a member's largest step takes beyond its parameters."""
        largest = max(train, key=lambda part: part.tokens.shape[1] * 2**20 + part.positions.shape[1])
        batch = run.trial.training.batch_size
        tokens, *asked = (x[None, :batch] for x in largest[1:])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = functools.partial(mean_loss, dtype=run.trial.training.dtype)
        Pack([run.model], batched=False).gradients(loss, tokens, *asked)
        return torch.cuda.max_memory_allocated() - before

    def run(self, on_epoch: Callable[[Run, Epoch], None]) -> None:
        """Train until all epochs are done, or so few members go on that they are better off in a pack of their own."""
        clock = time.perf_counter()
        start = self.runs[0].steps // sum(self.steps)
        rows, order = self._plan(start)
        for epoch in range(start, self.settings.epochs):
            self._load(rows, epoch)
            for s in order:
                self.replays[s]()
            self.validation.run()
            if epoch + 1 < self.settings.epochs:
                # While the device works.
                rows, order = self._plan(epoch + 1)
            losses, results = self.losses.cpu().T.contiguous(), self.validation.results()
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            for i, run in enumerate(self.runs):
                if run.message is None:
                    self._end_epoch(run, epoch, losses[i], results[i], seconds / len(self.runs), on_epoch)
            going = sum(run.message is None for run in self.runs)
            if 2 * going <= len(self.runs) or (going < len(self.runs) and not self.pack.batched):
                return

    def _end_epoch(
        self,
        run: Run,
        epoch: int,
        losses: Tensor,
        results: list[SliceResult],
        seconds: float,
        on_epoch: Callable[[Run, Epoch], None],
    ) -> None:
        before = run.steps
        run.steps += len(losses)
        train_loss = float(losses.mean())
        if not math.isfinite(train_loss):
            bad = before + int((~torch.isfinite(losses)).nonzero()[0])
            run.end(f"diverged: the training loss became {train_loss} at step {bad}, epoch {epoch}")
            return
        run.validated = results
        accuracy = mean_accuracy(results)
        line = Epoch(
            epoch=epoch,
            step=run.steps,
            learning_rate=self._rate(run, run.steps - 1),
            train_loss=train_loss,
            validation_loss=sum(r.loss for r in results) / len(results),
            validation_accuracy=accuracy,
            seconds=seconds,
        )
        run.history.append(line)
        on_epoch(run, line)
        if self.settings.stop_accuracy is not None and accuracy >= self.settings.stop_accuracy:
            run.end(f"validation accuracy reached {self.settings.stop_accuracy}")
        elif epoch + 1 == self.settings.epochs:
            finite = math.isfinite(line.validation_loss)
            run.end("all epochs done" if finite else f"diverged: the validation loss became {line.validation_loss}")

    def _plan(self, epoch: int) -> tuple[list[Tensor], list[int]]:
        """The rows of each slice's batches (steps, members, batch), and the slices in the order of their turns."""
        batch = self.settings.batch_size
        orders = {run.trial.seed: shuffled(self.sizes, batch, run.trial.seed, epoch) for run in self.runs}
        each = [orders[run.trial.seed] for run in self.runs]
        return [torch.stack(rows, dim=1) for rows in zip(*each, strict=True)], turns(self.steps, epoch)

    def _load(self, rows: list[Tensor], epoch: int) -> None:
        first = epoch * sum(self.steps)
        rates = [[self._rate(run, first + step) for run in self.runs] for step in range(sum(self.steps))]
        self.rates.copy_(torch.tensor(rates))
        self.index.zero_()
        for turn, to, these in zip(self.turn, self.rows, rows, strict=True):
            turn.zero_()
            to.copy_(these)

    def _rate(self, run: Run, step: int) -> float:
        return learning_rate(run.trial.optimizer, step, sum(self.steps), self.settings.epochs)

    def _step(self, s: int) -> None:
        # Short kernels beside long ones, which they do not touch.
        with lane(self.index, "step"):
            rates, number = self.rates.index_select(0, self.index)[0], self.optimizer.advance()
        losses = self._gradients(s)
        join(self.index, "step")
        with lane(self.index, "step"):
            self.losses.index_copy_(0, self.index, losses[None].float())
            self.index += 1
            self.turn[s] += 1
        self.optimizer.step(rates, number)
        join(self.index, "step")

    def _gradients(self, s: int) -> Tensor:
        part = self.train[s]
        rows = self.rows[s].index_select(0, self.turn[s])[0]
        return self.pack.gradients(self.loss, part.tokens[rows], part.positions[rows], part.answers[rows])


def mean_loss(model: Model, tokens: Tensor, positions: Tensor, answers: Tensor, dtype: Dtype = "float32") -> Tensor:
    """tokens (B, T), positions and answers (B, Q) -> the mean cross-entropy of the questions, in nats.

    Under autocast where the dtype is bfloat16: here, because gradients must not be.
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        with lane(answers, "count"):
            asked = (answers != IGNORE).sum()
        loss = model.answer(tokens, positions, answers, predict=False).loss.sum()
        join(answers, "count")
        return loss / asked


def shuffled(sizes: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """For slices of `sizes` examples the rows of an epoch's batches (steps, batch), of (seed, epoch) alone.

    Every batch is full: the examples left over differ from epoch to epoch.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    rows = (torch.randperm(size, generator=generator) for size in sizes)
    return [order[: len(order) // batch_size * batch_size].unflatten(0, (-1, batch_size)) for order in rows]


def turns(steps: Sequence[int], epoch: int) -> list[int]:
    """Which slice each step of an epoch draws its batch from: the same for all seeds, so that these can be a pack."""
    slices = torch.arange(len(steps)).repeat_interleave(torch.tensor(steps))
    return slices[torch.randperm(len(slices), generator=torch.Generator().manual_seed(epoch))].tolist()


def learning_rate(config: OptimizerConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of one step: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine_per_epoch":
        done = (step // steps_per_epoch) / epochs
    else:
        done = (step - config.warmup_steps) / max(1, steps_per_epoch * epochs - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
