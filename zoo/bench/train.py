"""`zoo bench train`: how long packs of trials take and where the time goes, beside what a peer took."""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click
import torch

from zoo.bench import peers
from zoo.bench.output import csv_lines, environment, hardware, save_environment
from zoo.bench.settings import choose, figure2_packs, grid_packs, lasting
from zoo.config import Trial
from zoo.errors import ConfigError
from zoo.evaluate import load_slices
from zoo.executors import Setting
from zoo.fit import Fit, Run
from zoo.model import build_model
from zoo.record import Epoch
from zoo.sweep import make_setting
from zoo.tasks import Task
from zoo.tasks.mqar import MQAR
from zoo.train import run_pack, validate

# Of a pack that is run for what its first time costs.
_FIRST_EPOCHS = 2
# Steps on each slice whose time is taken together, and how often: the median counts.
_STEPS, _REPEATS = 12, 3


class PackTime(NamedTuple):
    """One line of train.csv: a pack from its settings to its outcomes. Times are the pack's, but for trial_s.

    pack: `first` of its kind in this process, which compiles kernels, or `warm`. start_s: models, optimisers, graph
    capture, and kernels where they are not compiled yet. train_s: all epochs, each with its validation. epoch_s: the
    median epoch after the first. evaluate_s: the test slices, and the decode through the state. peak_mib: of GPU
    memory. peer_s: the peer's trial of as many epochs. ratio: peer_s / trial_s, on the peer's hardware.
    """

    setting: str
    pack: str
    trials: int
    diverged: int
    epochs: int
    data_s: float
    start_s: float
    train_s: float
    evaluate_s: float
    total_s: float
    trial_s: float
    epoch_s: float
    peak_mib: float | None
    peer_s: float | None
    ratio: float | None


class StepTime(NamedTuple):
    """One line of steps.csv: a pack's step on one training slice, on an epoch's mixture (`all`), or its `validation`.

    ms: wall time; ms_model: divided by the trials. steps_per_s and examples_per_s: of all trials together. busy: the
    share of the wall time in which the GPU computes anything; kernels: what it runs for that. peer_ms: the peer's step
    of one trial. ratio: peer_ms / ms_model, on the peer's hardware.
    """

    setting: str
    trials: int
    slice: str
    per_epoch: int
    ms: float
    ms_model: float
    steps_per_s: float
    examples_per_s: float
    busy: float | None
    kernels: float | None
    peer_ms: float | None
    ratio: float | None


@click.command("train")
@click.option("--settings", help="Settings to run, by name or beginning, comma-separated. Left out: all.")
@click.option("--grid", type=click.Path(), help="A sweep's YAML file: its packs are the settings then.")
@click.option("--pack", type=click.IntRange(1), default=4, show_default=True, help="Trials of a pack.")
@click.option("--epochs", type=click.IntRange(2), help="Left out: 32, or as the grid says.")
@click.option("--warm", is_flag=True, help=f"Run each pack for {_FIRST_EPOCHS} epochs first: what a worker pays once.")
@click.option("--steps/--no-steps", default=True, help="Also time single steps, and the GPU's busy share of them.")
@click.option("--device", help="cpu or cuda. Left out: cuda where torch sees a GPU.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench/train"),
    show_default=True,
    help="Folder for the CSV files.",
)
@click.pass_context
def command(
    ctx: click.Context,
    settings: str | None,
    grid: str | None,
    pack: int,
    epochs: int | None,
    warm: bool,
    steps: bool,
    device: str | None,
    threads: int,
    out: Path,
) -> None:
    """Train packs of trials as a sweep does, and say where the time goes.

    Without --grid: models on the mixture of BASED's Figure 2, in bf16, with the published learning rates, and with more
    seeds where a pack is larger. No trial stops early. Beside them stands what a peer took. The exit status is 1 when a
    pack has failed.
    """
    setting = make_setting(device, threads, ())
    packs = choose(grid_packs(grid, pack) if grid else figure2_packs(pack), settings)
    packs = {name: [lasting(trial, epochs) for trial in trials] for name, trials in packs.items()}
    for trials in packs.values():
        validate(trials[0])
    out.mkdir(parents=True, exist_ok=True)
    click.echo(save_environment(out, environment(setting)))
    failed = False
    with csv_lines(out / "train.csv") as add_pack, csv_lines(out / "steps.csv") as add_step:
        click.echo(PACK_TITLE)
        for name, trials in packs.items():
            peer = peers.RUNS.get(name) if grid is None else None
            try:
                if warm:
                    short = [lasting(trial, _FIRST_EPOCHS) for trial in trials]
                    pack_line = time_pack(name, "first", short, setting)
                    add_pack(pack_line)
                    click.echo(pack_text(pack_line))
                pack_line = time_pack(name, "warm" if warm else "first", trials, setting, peer)
                add_pack(pack_line)
                click.echo(pack_text(pack_line))
                for step_line in time_steps(name, trials, setting, peer) if steps else ():
                    add_step(step_line)
                    click.echo(step_text(step_line))
            except Exception as error:
                # A pack that needs too much memory, or a kernel that fails, must not cost the others their figures.
                click.echo(f"{name} failed: {type(error).__name__}: {error}", err=True)
                failed = True
    ctx.exit(1 if failed else 0)


def time_pack(
    name: str, which: str, trials: Sequence[Trial], setting: Setting, peer: peers.Run | None = None
) -> PackTime:
    """Run a pack as a sweep does.

    Raises ConfigError when no trial comes to the end of its second epoch.
    """
    on_gpu = setting.device.startswith("cuda")
    # Graphs of an earlier pack that only the garbage collector can free would count.
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    ends: list[tuple[int, float]] = []

    def on_epoch(_: int, epoch: Epoch) -> None:
        # One end for all members.
        if ends and ends[-1][0] == epoch.epoch:
            ends.pop()
        ends.append((epoch.epoch, time.perf_counter()))

    clock = time.perf_counter()
    outcomes = run_pack(trials, device=setting.device, threads=setting.threads, on_epoch=on_epoch)
    total = time.perf_counter() - clock

    data, evaluate = (len(trials) * s for s in (outcomes[0].timing.data, outcomes[0].timing.evaluate))
    instants = [clock + data, *(end for _, end in ends)]
    took = [(number, end - before) for (number, _), (before, end) in zip(ends, pairwise(instants), strict=True)]
    later = [seconds for number, seconds in took if number > 0]
    if not later:
        raise ConfigError("every trial diverged before the end of its second epoch; use lower learning rates.")
    epoch = statistics.median(later)
    # What a first epoch takes beyond the others is start-up. There are several where memory splits the pack.
    train = sum(later) + sum(min(seconds, epoch) for number, seconds in took if number == 0)
    epochs = trials[0].training.epochs
    peer_s = None if peer is None else peer.seconds * epochs / peers.EPOCHS
    return PackTime(
        setting=name,
        pack=which,
        trials=len(trials),
        diverged=sum(outcome.status == "diverged" for outcome in outcomes),
        epochs=epochs,
        data_s=data,
        start_s=total - data - train - evaluate,
        train_s=train,
        evaluate_s=evaluate,
        total_s=total,
        trial_s=total / len(trials),
        epoch_s=epoch,
        peak_mib=torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        peer_s=peer_s,
        ratio=peer_s / (total / len(trials)) if peer_s and _fair(setting) else None,
    )


def time_steps(
    name: str, trials: Sequence[Trial], setting: Setting, peer: peers.Run | None = None
) -> Iterator[StepTime]:
    """Some steps on each slice, and the validation, of a pack that is through its first epoch."""
    device, data, batch = setting.device, trials[0].data, trials[0].training.batch_size
    some = [entry.model_copy(update={"examples": min(entry.examples, _STEPS * batch)}) for entry in data.train]
    short = [lasting(trial, _FIRST_EPOCHS) for trial in trials]
    runs = [Run(trial, build_model(trial.model, data, trial.seed, device)) for trial in short]
    fit = Fit(
        runs,
        load_slices(some, data.seed, "train", device),
        load_slices(data.validation, data.seed, "validation", device),
        batched=device.startswith("cuda"),
    )
    fit.run(lambda run, epoch: None)

    def line(what: str, per_epoch: int, examples: float, work: Work, peer_ms: float | None = None) -> StepTime:
        model = work.ms / len(trials)
        return StepTime(
            setting=name,
            trials=len(trials),
            slice=what,
            per_epoch=per_epoch,
            ms=work.ms,
            ms_model=model,
            steps_per_s=1e3 / model,
            examples_per_s=1e3 * examples / model,
            busy=work.busy_ms / work.ms if work.busy_ms else None,
            kernels=work.kernels,
            peer_ms=peer_ms,
            ratio=peer_ms / model if peer_ms and _fair(setting) else None,
        )

    counts = [entry.examples // batch for entry in data.train]
    steps = []
    for s, (entry, count) in enumerate(zip(data.train, counts, strict=True)):
        steps.append(measure(functools.partial(_replay, fit, s), fit.steps[s], device))
        yield line(entry.options.slice_name, count, batch, steps[-1], _peer_ms(peer, entry.options))
    yield line("all", sum(counts), batch, mean(steps, counts))
    examples = sum(entry.examples for entry in data.validation)
    yield line("validation", 1, examples, measure(fit.validation.run, 1, device))


def _peer_ms(peer: peers.Run | None, task: Task) -> float | None:
    return peer.step_ms.get((task.seq_len, task.num_pairs)) if peer is not None and isinstance(task, MQAR) else None


def _replay(fit: Fit, s: int) -> None:
    """The steps of the loaded epoch on slice s, one after another."""
    fit.index.zero_()
    fit.turn[s].zero_()
    for _ in range(fit.steps[s]):
        fit.replays[s]()


class Work(NamedTuple):
    """Wall time in ms; on a GPU also the time that it computes, and what it runs for that. None: not measured."""

    ms: float
    busy_ms: float | None = None
    kernels: float | None = None


def mean(works: Sequence[Work], counts: Sequence[int]) -> Work:
    """The mean of one piece of work, where `counts` of each kind are done."""

    def of(values: Sequence[float]) -> float:
        return sum(n * value for n, value in zip(counts, values, strict=True)) / sum(counts)

    busy = [(w.busy_ms, w.kernels) for w in works if w.busy_ms is not None and w.kernels is not None]
    ms = of([w.ms for w in works])
    return Work(ms, of([b for b, _ in busy]), of([k for _, k in busy])) if len(busy) == len(works) else Work(ms)


def measure(work: Callable[[], object], parts: int, device: str) -> Work:
    """One of the equal `parts` of some work that can be done again."""
    times = []
    for _ in range(_REPEATS):
        _wait(device)
        clock = time.perf_counter()
        work()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - clock))
    ms = statistics.median(times) / parts
    if not device.startswith("cuda"):
        return Work(ms)
    # The profiler slows the host, so its wall time does not count.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        _wait(device)
    ran = [e.time_range for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return Work(ms, covered([(r.start, r.end) for r in ran]) / 1e3 / parts, len(ran) / parts)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of (start, end): kernels run beside each other."""
    total, last = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def _fair(setting: Setting) -> bool:
    """Whether the peer's figures are from hardware like this."""
    return hardware(setting.device) == peers.GPU


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


PACK_TITLE = (
    f"{'setting':24} {'pack':5} {'trials':>6} {'epochs':>6} {'data s':>7} {'start':>7} {'train':>7} {'test':>7} "
    f"{'total':>7} {'a trial':>7} {'peer':>7} {'ratio':>6} {'MiB':>7}"
)


def pack_text(line: PackTime) -> str:
    seconds = (line.data_s, line.start_s, line.train_s, line.evaluate_s, line.total_s, line.trial_s, line.peer_s)
    return (
        f"{line.setting:24} {line.pack:5} {line.trials:6} {line.epochs:6} "
        f"{' '.join(_number(s, 7, 2) for s in seconds)} {_number(line.ratio, 6, 1)} {_number(line.peak_mib, 7, 0)}"
        + (f"  {line.diverged} diverged" if line.diverged else "")
    )


def step_text(line: StepTime) -> str:
    unit = "run" if line.slice == "validation" else "step"
    return (
        f"    {line.slice:28} {line.ms:9.3f} ms a {unit}, {line.ms_model:9.3f} a model; "
        f"{line.steps_per_s:7,.1f} {unit}s/s, {line.examples_per_s:9,.0f} examples/s"
        + (f"; GPU busy {line.busy:4.0%}, {line.kernels:.0f} kernels" if line.busy else "")
        + (f"; peer {line.peer_ms:.2f} ms" if line.peer_ms else "")
        + (f", ratio {line.ratio:.1f}" if line.ratio else "")
    )


def _number(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:{width}.{digits}f}"
