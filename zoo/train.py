"""Fit one trial: data, model, optimiser, early stop on validation data, evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from zoo.config import OptimizerConfig, Trial
from zoo.errors import ConfigError
from zoo.evaluate import Slice, check_data, decode_through_state, evaluate, load_slices, mean_accuracy
from zoo.model import Model, build_model
from zoo.record import Epoch, Outcome, SliceResult, Timing
from zoo.tasks import IGNORE

OnEpoch = Callable[[Epoch], None]


def validate(trial: Trial) -> int:
    """Build the trial's model once and check its data, so that what cannot run raises ConfigError before any work.

    Returns the number of parameters.
    """
    check_data(trial.data)
    for entry in trial.data.train:
        if entry.examples < trial.training.batch_size:
            raise ConfigError(
                f"data.train: {entry.options.slice_name} has {entry.examples} examples, fewer than one batch of "
                f"{trial.training.batch_size}; raise examples or lower training.batch_size."
            )
    model = build_model(trial.model, trial.data, trial.seed)
    return sum(parameter.numel() for parameter in model.parameters())


def run_trial(trial: Trial, *, device: str = "cpu", threads: int = 1, on_epoch: OnEpoch | None = None) -> Outcome:
    """Train and evaluate one trial. Deterministic on one machine for one number of threads.

    Raises ConfigError when the trial cannot run. A loss that becomes NaN or infinite is an outcome, `diverged`.
    """
    torch.set_num_threads(threads)
    parameters = validate(trial)
    clock = time.perf_counter()
    train = load_slices(trial.data.train, trial.data.seed, "train", device)
    validation = load_slices(trial.data.validation, trial.data.seed, "validation", device)
    data_seconds = time.perf_counter() - clock
    model = build_model(trial.model, trial.data, trial.seed, device)

    clock = time.perf_counter()
    history, validated, steps, message = fit(model, trial, train, validation, on_epoch)
    train_seconds = time.perf_counter() - clock
    diverged = message.startswith("diverged")

    clock = time.perf_counter()
    test = load_slices(trial.data.test, trial.data.seed, "test", device)
    data_seconds += time.perf_counter() - clock
    clock = time.perf_counter()
    states, agreement = decode_through_state(model, test)
    tested = [] if diverged else evaluate(model, test)
    return Outcome(
        status="diverged" if diverged else "ok",
        message=message,
        parameters=parameters,
        steps=steps,
        history=tuple(history),
        validation=() if diverged else tuple(validated),
        test=tuple(tested),
        validation_accuracy=None if diverged else mean_accuracy(validated),
        test_accuracy=None if diverged else mean_accuracy(tested),
        state=tuple(states),
        agreement=None if diverged else agreement,
        timing=Timing(data=data_seconds, train=train_seconds, evaluate=time.perf_counter() - clock),
    )


def fit(
    model: Model, trial: Trial, train: list[Slice], validation: list[Slice], on_epoch: OnEpoch | None = None
) -> tuple[list[Epoch], list[SliceResult], int, str]:
    """Train `model` in place; stop early on validation data only.

    Returns the history, the last validation results, the steps taken, and why it stopped.
    """
    settings = trial.training
    device = model.embedding.weight.device
    optimizer = make_optimizer(model, trial.optimizer)
    steps_per_epoch = sum(len(s.tokens) // settings.batch_size for s in train)
    history: list[Epoch] = []
    results: list[SliceResult] = []
    step = 0
    model.train()
    for epoch in range(settings.epochs):
        clock = time.perf_counter()
        losses = []
        for tokens, positions, answers in batches(train, settings.batch_size, trial.seed, epoch):
            rate = learning_rate(trial.optimizer, step, steps_per_epoch, settings.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                loss = model.answer(tokens, positions, answers).loss.sum() / (answers != IGNORE).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if trial.optimizer.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), trial.optimizer.clip)
            optimizer.step()
            losses.append(loss.detach())
            step += 1
        train_loss = float(torch.stack(losses).mean())
        if not math.isfinite(train_loss):
            bad = int((~torch.isfinite(torch.stack(losses))).nonzero()[0]) + step - len(losses)
            return (
                history,
                results,
                step,
                f"diverged: the training loss became {train_loss} at step {bad}, epoch {epoch}",
            )
        results = evaluate(model, validation)
        history.append(
            Epoch(
                epoch=epoch,
                step=step,
                learning_rate=rate,
                train_loss=train_loss,
                validation_loss=sum(r.loss for r in results) / len(results),
                validation_accuracy=mean_accuracy(results),
                seconds=time.perf_counter() - clock,
            )
        )
        if on_epoch is not None:
            on_epoch(history[-1])
        if settings.stop_accuracy is not None and history[-1].validation_accuracy >= settings.stop_accuracy:
            return history, results, step, f"validation accuracy reached {settings.stop_accuracy}"
    if not math.isfinite(history[-1].validation_loss):
        return history, results, step, f"diverged: the validation loss became {history[-1].validation_loss}"
    return history, results, step, "all epochs done"


def batches(slices: list[Slice], batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One epoch's batches (tokens, positions, answers), each from one slice, in an order of (seed, epoch) alone.

    Every batch is full: the examples left over differ from epoch to epoch.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    plan = []
    for index, part in enumerate(slices):
        order = torch.randperm(len(part.tokens), generator=generator)
        plan += [(index, rows) for rows in order.split(batch_size) if len(rows) == batch_size]
    for i in torch.randperm(len(plan), generator=generator).tolist():
        index, rows = plan[i]
        part = slices[index]
        rows = rows.to(part.tokens.device)
        yield part.tokens[rows], part.positions[rows], part.answers[rows]


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


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with decay on matrices only; a parameter with `_no_weight_decay` is exempt."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in model.parameters():
        plain = parameter.dim() >= 2 and not getattr(parameter, "_no_weight_decay", False)
        (decayed if plain else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
