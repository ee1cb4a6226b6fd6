"""A sweep's trials -> packs -> records in a run folder. What has a record is not run again."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, get_args

from zoo.config import Sweep, Trial
from zoo.errors import ConfigError, UnsupportedError, ZooError
from zoo.executors import InlineExecutor, Job, JobPack, Listener, RayExecutor, Setting, import_ray, machine_slots
from zoo.process import MOST_THREADS
from zoo.progress import make_progress
from zoo.record import Record
from zoo.results import RunStore, error_text, is_run, load_runs
from zoo.tasks import IGNORE, Task
from zoo.text import clock

ExecutorName = Literal["auto", "ray", "inline"]

GPU_PACK = 16
"""Trials that train together on a GPU, where memory allows and the grid has them."""


class PlanWarning(UserWarning):
    """A trial that will fail, for no fault of its settings."""


@dataclass(frozen=True)
class Cost:
    """What a trial takes if it does not stop early. flops: multiply-adds of the weight matrices times 2, forward and
    backward; attention scores and scans are left out."""

    parameters: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class PlannedTrial:
    """A trial of a sweep, and what its run folder already holds of it. seconds: as similar finished trials took."""

    trial: Trial
    label: str
    record: Record | None
    will_run: bool
    cost: Cost | None
    seconds: float | None = None


@dataclass(frozen=True)
class Summary:
    """How a sweep ended. `done`: the records written by this call; `earlier`: those that were there before."""

    name: str
    run: Path
    done: tuple[Record, ...]
    earlier: tuple[Record, ...]
    missing: int
    seconds: float
    labels: Mapping[str, str]
    interrupted: bool = False

    @property
    def failed(self) -> list[Record]:
        """Every failed trial of the sweep, of this call or an earlier one."""
        return [record for record in (*self.done, *self.earlier) if record.status == "failed"]

    @property
    def exit_code(self) -> int:
        return 130 if self.interrupted else 1 if self.failed else 0

    def __str__(self) -> str:
        count = {s: sum(r.status == s for r in self.done) for s in ("ok", "diverged", "failed")}
        news = ", ".join(f"{n} {status}" for status, n in count.items() if n) or "nothing to run"
        lines = [f"{self.name}: {news} in {clock(self.seconds)}; {len(self.earlier)} had a record before."]
        for record in self.failed:
            lines.append(f"  failed {record.key[:8]}  {self.labels[record.key]}")
            lines += [f"      {line}" for line in (error_text(record) or "").splitlines()[:2]]
        if self.failed:
            lines.append(f"Tracebacks: zoo inspect {self.run} KEY. Run the failed ones again: --retry-failed.")
        if self.interrupted:
            lines.append(f"Interrupted with {self.missing} trials to go; the same command goes on from here.")
        return "\n".join(lines)


def run_sweep(
    sweep: Sweep,
    run_dir: str | Path,
    *,
    executor: ExecutorName = "auto",
    device: str | None = None,
    workers: int | None = None,
    threads: int = 1,
    pack: int | None = None,
    shard: tuple[int, int] = (1, 1),
    plugins: Sequence[str] = (),
    known: Sequence[str | Path] = (),
    retry_failed: bool = False,
    progress: bool = True,
) -> Summary:
    """Run every trial of `sweep` that has no record in `run_dir`, and write one record for each as it ends.

    executor: `inline` runs one pack after another in this process, `ray` several at once; `auto` is ray where it is
    installed and there is more than one pack and slot. device: cpu or cuda; None is cuda where torch sees one.
    workers: packs at once on ray. threads: of the CPU, for each pack; results depend on it in the last bits.
    pack: trials that may train together, if only learning rate, weight decay and seed tell them apart; None is
    GPU_PACK on a GPU, where a pack costs little more than a trial, and 1 elsewhere.
    plugins: files or modules that workers import; this process must have imported them already.
    shard: (k, n) runs the k-th of n equally dear parts, for machines without a Ray between them; each part needs a run
    folder of its own, and figures take several. known: other runs, such as `reference`, whose records of these trials
    are copied instead of run again. retry_failed: run trials whose record is a failure again. progress: report on
    stderr.

    Ctrl-C ends it with a summary whose `interrupted` is set; the same call later goes on.

    Raises:
        ConfigError: a model or task that cannot be built, before any trial runs.
        RecordError: another sweep is writing to `run_dir`.
        UnsupportedError: the executor or the device is not there.
    """
    begin = time.monotonic()
    _check_arguments(executor, workers, threads, pack, shard)
    setting = make_setting(device, threads, plugins, executor)
    plan = plan_sweep(sweep, run_dir, known=known, retry_failed=retry_failed)
    store = RunStore(run_dir, create=True)
    done: dict[str, Record] = {}
    interrupted = False
    with store.lock():
        kept = store.keys()
        if any(p.will_run and p.trial.key in kept for p in plan):
            # Another sweep may have written since, and what it has must not run again and be replaced.
            plan = plan_sweep(sweep, run_dir, known=known, retry_failed=retry_failed)
        earlier = tuple(p.record for p in plan if p.record is not None and not p.will_run)
        # Long packs first: the last ones to end are then short, and no slot idles for long.
        packs = make_packs(plan, pack or (GPU_PACK if setting.device.startswith("cuda") else 1), shard)
        jobs = [job for members in packs for job in members]
        for record in earlier:
            if record.key not in kept:
                store.write(record)
        store.write_sweep({"name": sweep.name, "source": sweep.source, "keys": [t.key for t in sweep.trials]})
        try:
            if jobs:
                run = _choose(executor, setting, workers, len(packs))
                with make_progress(sweep.name, jobs, progress) as display:
                    run.run(packs, _Recorder(store, display, done))
        except KeyboardInterrupt:
            interrupted = True
    return Summary(
        sweep.name,
        Path(run_dir),
        tuple(done.values()),
        earlier,
        len(jobs) - len(done),
        time.monotonic() - begin,
        sweep.labels,
        interrupted,
    )


def make_setting(
    device: str | None, threads: int, plugins: Iterable[str], executor: ExecutorName = "inline"
) -> Setting:
    """How trials run, checked for this machine. Raises UnsupportedError on a device that is not there."""
    files = tuple(str(Path(p).expanduser().resolve()) if p.endswith(".py") else p for p in plugins)
    return Setting(resolve_device(device, executor), threads, files, git=_git_commit())


def plan_sweep(
    sweep: Sweep,
    run_dir: str | Path,
    *,
    known: Sequence[str | Path] = (),
    retry_failed: bool = False,
    every: bool = False,
) -> list[PlannedTrial]:
    """What running `sweep` would do; nothing runs and nothing is written.

    Builds each distinct model that will run (`every`: also the others) once, and estimates costs. One that raises is
    named in a PlanWarning, and counts as one that will run and fail.

    Raises ConfigError that names every setting that cannot run.
    """
    records = {record.key: record for record in load_runs(known) if record.status != "failed"}
    if is_run(run_dir):
        records |= {record.key: record for record in RunStore(run_dir).load()}
    due = {t.key for t in sweep.trials if t.key not in records or (retry_failed and records[t.key].status == "failed")}
    costs = _estimate([t for t in sweep.trials if every or t.key in due])
    rates = _rates(sweep.trials, records)
    plan = []
    for trial in sweep.trials:
        cost = costs.get(trial.key)
        rate = rates.get(trial.model.family)
        seconds = cost.flops * rate if cost is not None and rate is not None else None
        plan.append(
            PlannedTrial(trial, sweep.labels[trial.key], records.get(trial.key), trial.key in due, cost, seconds)
        )
    return plan


def make_packs(plan: Iterable[PlannedTrial], size: int, shard: tuple[int, int] = (1, 1)) -> list[JobPack]:
    """The trials of a shard that will run, up to `size` in a pack, the dearest pack first.

    What has a record does not move the others to another shard.
    """
    from zoo.train import pack_identity

    alike: dict[str, list[PlannedTrial]] = {}
    for planned in plan:
        alike.setdefault(pack_identity(planned.trial), []).append(planned)
    chunks = [some[i : i + size] for some in alike.values() for i in range(0, len(some), size)]
    k, n = shard
    # Neighbours in the grid cost about the same, so every n-th is a fair share.
    packs = [
        tuple(Job.of(p.trial, p.cost.flops, p.label) for p in chunk if p.will_run and p.cost is not None)
        for chunk in chunks[k - 1 :: n]
    ]
    return sorted(filter(None, packs), key=lambda pack: -sum(job.cost for job in pack))


def _estimate(trials: list[Trial]) -> dict[str, Cost]:
    """By key. Each distinct model and mixture is built once; the errors of all settings are raised together.

    A mixer or task that raises by a fault of its own costs nothing: its trials fail when they run; the others go on.
    """
    from zoo.train import validate

    parameters: dict[str, int | None] = {}
    errors: dict[str, list[str]] = {}
    costs = {}
    for trial in trials:
        same = f"{trial.model.model_dump_json()} {trial.data.model_dump_json()} {trial.training.batch_size}"
        if same not in parameters:
            parameters[same] = None
            try:
                parameters[same] = validate(trial)
                _cost(trial, 0)
            except ConfigError as error:
                errors.setdefault(str(error), []).append(trial.label)
            except ZooError:
                raise
            except Exception as error:
                parameters[same] = None
                what = f"{trial.label} will fail, and the others go on: {type(error).__name__}: {error}"
                warnings.warn(what, PlanWarning, stacklevel=3)
        size = parameters[same]
        costs[trial.key] = Cost(0, 0, 0.0) if size is None else _cost(trial, size)
    if errors:
        raise ConfigError(
            "\n".join(
                f"{who[0]}{f' and {len(who) - 1} other models' if len(who) > 1 else ''}: {error}"
                for error, who in errors.items()
            )
        )
    return costs


def _cost(trial: Trial, parameters: int) -> Cost:
    embedding = trial.data.vocabulary * trial.model.d_model
    tokens = answers = 0
    for entry in trial.data.train:
        tokens += entry.examples * entry.options.length
        answers += entry.examples * _answers_per_example(entry.options)
    epochs = trial.training.epochs
    flops = 6.0 * epochs * (tokens * max(1, parameters - embedding) + answers * embedding)
    return Cost(parameters, tokens * epochs, flops)


@functools.lru_cache(maxsize=1024)
def _answers_per_example(task: Task) -> int:
    return int((task.sample(1, 0, "train").answers != IGNORE).sum())


def _rates(trials: Iterable[Trial], records: dict[str, Record]) -> dict[str, float]:
    """Seconds per FLOP of each family, the median over its finished trials."""
    found: dict[str, list[float]] = {}
    for trial in trials:
        record = records.get(trial.key)
        if record is not None and record.status == "ok" and record.outcome is not None:
            cost = _cost(trial, record.outcome.parameters)
            found.setdefault(trial.model.family, []).append(record.provenance.seconds / cost.flops)
    return {name: median(rates) for name, rates in found.items()}


class _Recorder:
    """Writes each record before it is shown."""

    def __init__(self, store: RunStore, display: Listener, done: dict[str, Record]) -> None:
        self.store, self.display, self.done = store, display, done
        self.started, self.epoch, self.lost = display.started, display.epoch, display.lost

    def finished(self, job: Job, record: Record) -> None:
        self.store.write(record)
        self.done[job.key] = record
        self.display.finished(job, record)


def _choose(executor: str, setting: Setting, workers: int | None, packs: int) -> InlineExecutor | RayExecutor:
    if executor == "auto":
        several = packs > 1 and ("RAY_ADDRESS" in os.environ or machine_slots(setting, workers) > 1)
        executor = "ray" if several and importlib.util.find_spec("ray") is not None else "inline"
    if executor == "inline":
        if workers is not None and workers > 1:
            raise ConfigError(f"{workers} workers need Ray: --executor ray, after `pip install 'zoo-mixers[ray]'`.")
        return InlineExecutor(setting)
    return RayExecutor(setting, workers)


def parse_shard(text: str) -> tuple[int, int]:
    """2/4 -> (2, 4). Raises ConfigError."""
    k, _, n = text.partition("/")
    if not (k.isdigit() and n.isdigit()):
        raise ConfigError(f"shard {text!r} is not of the form K/N, such as 2/4.")
    return int(k), int(n)


def _check_arguments(
    executor: str, workers: int | None, threads: int, pack: int | None, shard: tuple[int, int]
) -> None:
    if executor not in get_args(ExecutorName):
        raise ConfigError(f"unknown executor {executor!r}; use one of {', '.join(get_args(ExecutorName))}.")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers} must be at least 1.")
    if not 1 <= threads <= MOST_THREADS:
        raise ConfigError(f"threads {threads} must be from 1 to {MOST_THREADS}.")
    if pack is not None and pack < 1:
        raise ConfigError(f"pack {pack} must be at least 1.")
    if not 1 <= shard[0] <= shard[1]:
        raise ConfigError(f"shard {shard[0]}/{shard[1]} is none; the first of four is 1/4, the last 4/4.")
    if executor == "ray":
        import_ray()


def resolve_device(device: str | None, executor: str = "inline") -> str:
    """The device of that name; None is the best one. Raises ConfigError, or UnsupportedError if it is not here."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}; use cpu or cuda.") from None
    # A Ray driver may stand on a machine without a GPU.
    if kind == "cuda" and executor != "ray" and not torch.cuda.is_available():
        raise UnsupportedError(f"device {device!r}, but torch {torch.__version__} sees no GPU; use --device cpu.")
    return device


def _git_commit() -> str | None:
    """The commit of the checkout that zoo runs from, `+dirty` when files differ from it; None outside a checkout.

    ZOO_COMMIT names it where the code was copied without its history, as into a container.
    """
    if "ZOO_COMMIT" in os.environ:
        return os.environ["ZOO_COMMIT"]
    root = Path(__file__).resolve().parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    commit = subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    status = subprocess.run([git, "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True)
    if commit.returncode or status.returncode:
        return None
    return commit.stdout.strip() + ("+dirty" if status.stdout.strip() else "")
