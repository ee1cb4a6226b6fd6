"""Where packs of trials run: in this process, or on Ray. Both run the same function and give the same bits."""

from __future__ import annotations

import gc
import logging
import math
import os
import pickle
import platform
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zoo.errors import ConfigError, DeviceLostError, PluginError, UnsupportedError
from zoo.process import available_cores
from zoo.record import Epoch, Failure, Outcome, Provenance, Record
from zoo.registry import load_plugins
from zoo.rehearse import rehearsing

if TYPE_CHECKING:
    from zoo.config import Trial

ATTEMPTS = 3
"""How often a trial is tried whose worker process dies."""

PACKS_PER_WORKER = 50
"""Packs after which a worker process is replaced, so that a leak in a plugin stays small."""


@dataclass(frozen=True)
class Job:
    """One trial to run, as plain data: a worker can read it before it knows the plugins.

    cost: what it takes relative to the others.
    """

    key: str
    label: str
    trial: dict[str, Any]
    versions: dict[str, str]
    cost: float = 1.0
    attempt: int = 1

    @classmethod
    def of(cls, trial: Trial, cost: float = 1.0, label: str | None = None) -> Job:
        return cls(trial.key, label or trial.label, trial.model_dump(mode="json"), trial.versions, cost)


@dataclass(frozen=True)
class Setting:
    """What is the same for every trial of a sweep. plugins: absolute paths of files, or names of modules."""

    device: str = "cpu"
    threads: int = 1
    plugins: tuple[str, ...] = ()
    executor: str = "inline"
    git: str | None = None


class Listener(Protocol):
    """What is told how trials go, always in the driver's own thread."""

    def started(self, job: Job) -> None: ...

    def epoch(self, job: Job, epoch: Epoch) -> None: ...

    def finished(self, job: Job, record: Record) -> None: ...

    def lost(self, job: Job, reason: str) -> None:
        """The worker process died; the trial is tried again later."""


JobPack = tuple[Job, ...]
"""Trials that train together; on a GPU as one stacked model."""

OnEpoch = Callable[[Job, Epoch], None]


def execute(pack: JobPack, setting: Setting, on_epoch: OnEpoch | None = None) -> list[Record]:
    """Run a pack of trials in this process. A trial that raises gives a record too, with its traceback.

    When a pack raises, its halves run again, so that in the end the failure falls on the guilty alone, and so that
    they fit where the whole was too large for the device's memory.

    Raises DeviceLostError when the device does not work after the failure; there are no records then.
    """
    import torch

    from zoo.config import Trial
    from zoo.train import run_pack

    started, clock = _now(), time.perf_counter()
    results: Sequence[Outcome | Failure] = ()
    failure = None
    try:
        load_plugins(setting.plugins)
        trials = [Trial.model_validate(job.trial) for job in pack]
        for job, trial in zip(pack, trials, strict=True):
            if trial.key != job.key:
                raise PluginError(
                    f"the worker's code differs from the driver's: versions {trial.versions} there, {job.versions} "
                    "here; use the same zoo and the same plugins everywhere, and do not edit them during a sweep."
                )
        torch.set_num_threads(setting.threads)
        heard = None if on_epoch is None else lambda i, epoch: on_epoch(pack[i], epoch)
        results = run_pack(trials, device=setting.device, threads=setting.threads, on_epoch=heard)
    except (Exception, SystemExit) as error:
        failure = Failure(error=type(error).__name__, message=str(error), traceback=traceback.format_exc())
    if failure is not None:
        # Only here, when the exception is gone: it keeps the frames that it came through, and all that they hold.
        _release_memory(setting.device, pack[0].label, failure)
        if len(pack) > 1:
            halves = pack[: len(pack) // 2], pack[len(pack) // 2 :]
            return [record for half in halves for record in execute(half, setting, on_epoch)]
        results = [failure]
    seconds = (time.perf_counter() - clock) / len(pack)
    return [_record(job, setting, r, started, seconds, len(pack)) for job, r in zip(pack, results, strict=True)]


def _release_memory(device: str, label: str, failure: Failure) -> None:
    """Free what a failed pack held on a GPU, and see whether it still works."""
    import torch

    gc.collect()
    if not device.startswith("cuda"):
        return
    try:
        torch.cuda.empty_cache()
        torch.zeros(1, device=device).cpu()
    except RuntimeError as error:
        raise DeviceLostError(
            f"{device} no longer works in this process ({str(error).partition(chr(10))[0]}) since {label} raised "
            f"{failure.error}: {failure.message.partition(chr(10))[0]}. Run the same command again: it goes on behind "
            "the trials that have a record; if it ends here again, leave that trial out or run it on a CPU."
        ) from error


def _record(
    job: Job, setting: Setting, result: Outcome | Failure, started: str, seconds: float, members: int
) -> Record:
    import torch

    import zoo

    return Record(
        key=job.key,
        status=result.status if isinstance(result, Outcome) else "failed",
        trial=job.trial,
        versions=job.versions,
        outcome=result if isinstance(result, Outcome) else None,
        failure=result if isinstance(result, Failure) else None,
        provenance=Provenance(
            zoo=zoo.__version__,
            git=setting.git,
            torch=torch.__version__,
            python=platform.python_version(),
            device=_device_name(setting.device),
            threads=setting.threads,
            executor=setting.executor,
            started=started,
            seconds=seconds,
            pack=members,
            attempt=job.attempt,
        ),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device


class InlineExecutor:
    """One pack after another in this process."""

    def __init__(self, setting: Setting) -> None:
        self.setting = replace(setting, executor="inline")

    def run(self, packs: Sequence[JobPack], listener: Listener) -> None:
        import torch

        threads = torch.get_num_threads()
        try:
            with rehearsing(packs, self.setting):
                for pack in packs:
                    for job in pack:
                        listener.started(job)
                    for job, record in zip(pack, execute(pack, self.setting, listener.epoch), strict=True):
                        listener.finished(job, record)
        finally:
            torch.set_num_threads(threads)


class RayExecutor:
    """Packs of trials as Ray Core tasks that stream their epochs and then their records.

    Without RAY_ADDRESS a private Ray starts on this machine and ends with the sweep; with it, or inside a program that
    has called `ray.init`, that Ray is used. `workers` packs run at once: by default as many as there are cores
    (divided by `threads`), or, on cuda, GPUs; more workers than GPUs share them.

    A worker process that dies (out of memory, a segmentation fault, an exit) takes its trials along. Each of them is
    tried again alone, when the others are done, because the guilty one can take innocent ones along.
    """

    def __init__(self, setting: Setting, workers: int | None = None) -> None:
        if setting.device not in ("cpu", "cuda"):
            raise ConfigError(
                f"device {setting.device!r} cannot be used on Ray, which hands out devices itself; use cpu or cuda, "
                "or --executor inline."
            )
        self.setting = replace(setting, executor="ray")
        self.workers = workers

    def run(self, packs: Sequence[JobPack], listener: Listener) -> None:
        ray = import_ray()
        own = not ray.is_initialized()
        if own:
            start_ray(ray, self.setting, self.workers)
        try:
            slots, gpu_share = _slots(ray, self.setting, self.workers)
            task = _remote_task(ray, self.setting.threads, gpu_share)
            # A waiting task for each slot, so that no worker idles while the driver writes a record.
            limit = slots if self.workers is not None else 2 * slots
            _Flight(ray, task, self.setting, listener, limit).run(packs)
        finally:
            if own:
                ray.shutdown()


def _slots(ray: Any, setting: Setting, workers: int | None) -> tuple[int, float]:
    """How many packs Ray runs at once, and the share of a GPU that each gets."""
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if setting.device == "cuda" and not gpus:
        raise UnsupportedError("device cuda, but Ray sees no GPU; use --device cpu.")
    if cpus < setting.threads:
        raise ConfigError(f"{setting.threads} threads a trial, but Ray has {cpus} CPUs; lower --threads.")
    slots, gpu_share = cpus // setting.threads, 0.0
    if setting.device == "cuda":
        per_gpu = math.ceil((workers or gpus) / gpus)
        slots, gpu_share = min(slots, gpus * per_gpu), 1 / per_gpu
    return min(slots, workers or slots), gpu_share


def _remote_task(ray: Any, threads: int, gpu_share: float) -> Any:
    # A local function travels by value, and its arguments as bytes: a worker finds zoo once sys.path is complete.
    def run_pack(sys_path: list[str], payload: bytes) -> Iterator[Any]:
        sys.path += [path for path in sys_path if path not in sys.path]
        from zoo.executors import stream

        yield from stream(*pickle.loads(payload))

    return ray.remote(
        num_cpus=threads,
        num_gpus=gpu_share,
        num_returns="streaming",
        max_calls=PACKS_PER_WORKER,
        max_retries=0,
    )(run_pack)


def machine_slots(setting: Setting, workers: int | None = None) -> int:
    """Packs that run at once on this machine: `workers`, or one for each GPU, or one for each `threads` cores."""
    import torch

    if workers is not None:
        return workers
    if setting.device == "cuda":
        return torch.cuda.device_count()
    return max(1, available_cores() // setting.threads)


def import_ray() -> Any:
    """Ray, or UnsupportedError with the remedy."""
    try:
        # Read when Ray is imported. The driver reports the death of a worker itself.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", r"worker.*(died|killed)")
        import ray
    except ImportError as error:
        raise UnsupportedError(
            f"Ray cannot be imported ({error}); `pip install 'zoo-mixers[ray]'`, or use --executor inline."
        ) from error
    return ray


def start_ray(ray: Any, setting: Setting, workers: int | None = None) -> None:
    """Join the Ray of RAY_ADDRESS, or start a private one that is as small and quiet as Ray can be.

    Raises UnsupportedError when it cannot be joined or started.
    """
    # Ray's hints about its own set-up are not the user's business; its errors still come through.
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {
            "address": "local",
            "num_cpus": machine_slots(setting, workers) * setting.threads,
            "num_gpus": None if setting.device == "cuda" else 0,
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,
        }
    else:
        options = {}
    try:
        ray.init(configure_logging=False, log_to_driver=False, **options)
    except Exception as error:
        what = "cannot start on this machine" if address is None else f"at RAY_ADDRESS={address} cannot be joined"
        raise UnsupportedError(f"Ray {what}: {type(error).__name__}: {error}. Or use --executor inline.") from error


def stream(pack: JobPack, setting: Setting) -> Iterator[tuple[int, Epoch | Record | None]]:
    """In a worker, each with its trial's index in the pack: None when it starts, its epochs as they end, its record."""
    yield from ((i, None) for i in range(len(pack)))
    events: queue.SimpleQueue[tuple[int, Epoch | Record] | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            records = execute(pack, setting, lambda job, epoch: events.put((pack.index(job), epoch)))
            for i, record in enumerate(records):
                events.put((i, record))
        except BaseException as error:
            events.put(error)
        finally:
            events.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (event := events.get()) is not None:
        if isinstance(event, DeviceLostError):
            # Ray then starts another worker, and what this one was at is tried again.
            os._exit(1)
        if isinstance(event, BaseException):
            raise event
        yield event


class _Flight:
    """The driver's side of a sweep on Ray: at most `limit` tasks at once, each a stream of events."""

    def __init__(self, ray: Any, task: Any, setting: Setting, listener: Listener, limit: int) -> None:
        self.ray, self.task, self.setting, self.listener, self.limit = ray, task, setting, listener, limit
        self.flying: dict[Any, JobPack] = {}
        self.recorded: set[str] = set()
        self.suspects: deque[Job] = deque()

    def run(self, packs: Sequence[JobPack]) -> None:
        waiting = deque(packs)
        try:
            while waiting or self.flying or self.suspects:
                while waiting and len(self.flying) < self.limit:
                    self._submit(waiting.popleft())
                if not self.flying:
                    self._submit((self.suspects.popleft(),))
                # The time-out lets Python see Ctrl-C.
                ready, _ = self.ray.wait(list(self.flying), num_returns=1, timeout=0.5)
                for one in ready:
                    self._next_event(one)
        except BaseException:
            for one in self.flying:
                self.ray.cancel(one, force=True)
            raise

    def _submit(self, pack: JobPack) -> None:
        paths = [str(Path(path).resolve()) for path in sys.path]
        self.flying[self.task.remote(paths, pickle.dumps((pack, self.setting)))] = pack

    def _next_event(self, one: Any) -> None:
        pack = self.flying[one]
        try:
            i, event = self.ray.get(next(one))
        except StopIteration:
            for job in self._land(one):
                self._fail(job, "WorkerDied", "the worker ended without a result.", "")
        except self.ray.exceptions.RayTaskError as error:
            # zoo itself cannot be imported there, or the like: it would fail again.
            for job in self._land(one):
                self._fail(job, type(error.cause).__name__, str(error.cause), str(error))
        except self.ray.exceptions.RayError as error:
            for job in self._land(one):
                self._died(job, error)
        else:
            if event is None:
                self.listener.started(pack[i])
            elif isinstance(event, Epoch):
                self.listener.epoch(pack[i], event)
            else:
                self._finish(pack[i], event)

    def _land(self, one: Any) -> list[Job]:
        """The trials of a task that has ended which have no record."""
        return [job for job in self.flying.pop(one) if job.key not in self.recorded]

    def _finish(self, job: Job, record: Record) -> None:
        self.recorded.add(job.key)
        self.listener.finished(job, record)

    def _died(self, job: Job, error: Exception) -> None:
        if job.attempt < ATTEMPTS:
            self.listener.lost(job, type(error).__name__)
            self.suspects.append(replace(job, attempt=job.attempt + 1))
            return
        message = (
            f"the worker process died ({type(error).__name__}) in each of {ATTEMPTS} attempts, the last ones with no "
            "other trial beside it: out of memory, a crash in native code, or an exit call. Try it with --executor "
            "inline, or a smaller model."
        )
        # Ray's report of a memory shortage goes on with a list of everybody's processes.
        self._fail(job, "WorkerDied", message, str(error).partition("Top 10 memory users")[0])

    def _fail(self, job: Job, error: str, message: str, details: str) -> None:
        failure = Failure(error=error, message=message, traceback=details)
        self._finish(job, _record(job, self.setting, failure, _now(), 0.0, 1))
