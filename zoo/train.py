"""From trials to outcomes: data, models, training as a pack, evaluation."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch

from zoo.allowance import Allowance
from zoo.config import DataEntry, Trial
from zoo.decode import DECODED, decode_through_state
from zoo.errors import ConfigError
from zoo.evaluate import PackEvaluation, Slice, check_data, load_slices, mean_accuracy
from zoo.fit import Fit, Run
from zoo.model import Model, build_model
from zoo.pack import Pack
from zoo.record import Agreement, Epoch, MeasuredState, Outcome, SliceResult, Timing
from zoo.tasks import Split

OnEpoch = Callable[[int, Epoch], None]
"""Called with a member's index in the pack and its epoch."""

# A pack leaves some memory to the graphs' own pools and to fragmentation.
_USABLE_MEMORY = 0.8
# 8 GiB in fp32, and AdamW's moments as much twice more.
_MOST_NUMBERS = 2**31


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
    steps = trial.training.epochs * sum(e.examples // trial.training.batch_size for e in trial.data.train)
    if trial.optimizer.warmup_steps > steps:
        raise ConfigError(
            f"optimizer.warmup_steps: {trial.optimizer.warmup_steps:,} are more than the trial's {steps:,} steps, and "
            "the learning rate would never be reached; lower them, or raise training.epochs."
        )
    embedding = trial.data.vocabulary * trial.model.d_model
    if embedding > _MOST_NUMBERS:
        raise ConfigError(
            f"an embedding of {trial.data.vocabulary:,} tokens by d_model {trial.model.d_model} has {embedding:,} "
            f"numbers, more than {_MOST_NUMBERS:,}; lower the task's vocabulary or d_model."
        )
    with Allowance(_MOST_NUMBERS, "the model", "lower what makes it so large: depth, d_model or an option of a layer"):
        model = build_model(trial.model, trial.data, trial.seed)
    with Allowance(
        _MOST_NUMBERS // DECODED,
        "the state of one sequence",
        f"lower the option that sets its size: {DECODED} sequences are decoded at once",
    ):
        model.init_state(1)
    return _size(model)


def pack_identity(trial: Trial) -> str:
    """Trials of one identity can train as one pack: they differ in learning rate, weight decay and seed alone."""
    return trial.model_dump_json(exclude={"seed": True, "optimizer": {"lr", "weight_decay"}})


def run_trial(
    trial: Trial, *, device: str = "cpu", threads: int = 1, on_epoch: Callable[[Epoch], None] | None = None
) -> Outcome:
    """Train and evaluate one trial: a pack of one."""
    heard = None if on_epoch is None else lambda _, epoch: on_epoch(epoch)
    return run_pack([trial], device=device, threads=threads, on_epoch=heard)[0]


def run_pack(
    trials: Sequence[Trial], *, device: str = "cpu", threads: int = 1, on_epoch: OnEpoch | None = None
) -> list[Outcome]:
    """Train and evaluate trials of one `pack_identity` together; each gets what it would get alone.

    Deterministic on one machine for one number of threads; on a CPU to the last bit, whatever else is in the pack. A
    loss that becomes NaN or infinite is an outcome, `diverged`, of its trial alone. On a GPU with too little memory
    the pack is split. Times are the pack's, divided by its members.

    Raises ConfigError when a trial cannot run.
    """
    assert len({pack_identity(trial) for trial in trials}) == 1
    torch.set_num_threads(threads)
    validate(trials[0])
    clock = time.perf_counter()
    data = trials[0].data
    train, validation, test = (
        _slices(mixture, data.seed, split, device)
        for mixture, split in ((data.train, "train"), (data.validation, "validation"), (data.test, "test"))
    )
    data_seconds = time.perf_counter() - clock

    clock = time.perf_counter()
    runs = [Run(trial, build_model(trial.model, data, trial.seed, device)) for trial in trials]
    for group in _groups(runs, train):
        going = group
        while going:
            fit = Fit(going, train, validation, batched=_on_gpu(runs))
            fit.run(lambda run, epoch: on_epoch(runs.index(run), epoch) if on_epoch is not None else None)
            going = [run for run in going if run.message is None]
    for run in runs:
        run.restore()
    train_seconds = time.perf_counter() - clock

    clock = time.perf_counter()
    pack = Pack([run.model for run in runs], batched=_on_gpu(runs))
    evaluation = PackEvaluation(pack, test, trials[0].training.dtype)
    evaluation.run()
    tested = evaluation.results()
    decoded = decode_through_state(pack, test)
    evaluate_seconds = time.perf_counter() - clock
    timing = Timing(
        data=data_seconds / len(runs), train=train_seconds / len(runs), evaluate=evaluate_seconds / len(runs)
    )
    return [_outcome(*parts, timing) for parts in zip(runs, tested, decoded, strict=True)]


def _outcome(
    run: Run, tested: list[SliceResult], decoded: tuple[list[MeasuredState], Agreement], timing: Timing
) -> Outcome:
    assert run.message is not None
    states, agreement = decoded
    diverged = run.diverged
    return Outcome(
        status="diverged" if diverged else "ok",
        message=run.message,
        parameters=_size(run.model),
        steps=run.steps,
        history=tuple(run.history),
        validation=() if diverged else tuple(run.validated),
        test=() if diverged else tuple(tested),
        validation_accuracy=None if diverged else mean_accuracy(run.validated),
        test_accuracy=None if diverged else mean_accuracy(tested),
        state=tuple(states),
        agreement=None if diverged else agreement,
        timing=timing,
    )


@functools.lru_cache(maxsize=6)
def _slices(mixture: tuple[DataEntry, ...], seed: int, split: Split, device: str) -> list[Slice]:
    """A mixture on the device; the last ones stay there, because the next pack mostly needs the same."""
    return load_slices(mixture, seed, split, device)


def _groups(runs: list[Run], train: list[Slice]) -> list[list[Run]]:
    """The runs in as few packs as the device's memory allows."""
    if len(runs) == 1 or not _on_gpu(runs):
        return [runs]
    # What torch has reserved and does not use is free too.
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    most = max(1, int(_USABLE_MEMORY * free / Fit.memory_of_one(runs[0], train)))
    return [runs[i : i + most] for i in range(0, len(runs), most)]


def _on_gpu(runs: list[Run]) -> bool:
    return runs[0].model.embedding.weight.is_cuda


def _size(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
