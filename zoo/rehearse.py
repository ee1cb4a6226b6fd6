"""Compile a sweep's GPU kernels ahead, in processes beside the training: a pack then finds them in Triton's cache."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from zoo.process import available_cores
from zoo.registry import load_plugins

if TYPE_CHECKING:
    from zoo.config import DataEntry
    from zoo.executors import JobPack, Setting

# Each holds half a gigabyte of GPU memory for its context.
MOST_PROCESSES = 16
# Kernels are specialised on lengths and channels, not on how many sequences there are.
EXAMPLES = 16


@contextlib.contextmanager
def rehearsing(packs: Sequence[JobPack], setting: Setting) -> Iterator[None]:
    """While packs run on a GPU, rehearse those after the first, in their order, on the cores that are free."""
    processes = min(MOST_PROCESSES, available_cores() - 1, len(packs) - 1) if setting.device.startswith("cuda") else 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = []
    for i in range(processes):
        child = subprocess.Popen(
            [sys.executable, "-m", "zoo.rehearse"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert child.stdin is not None
        child.stdin.write(pickle.dumps((packs[1 + i :: processes], setting)))
        child.stdin.close()
        children.append(child)
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def rehearse(pack: JobPack, setting: Setting) -> None:
    """One step of every training slice, one evaluation and one decode of a pack of two, on a few examples."""
    import torch

    from zoo.config import Trial
    from zoo.decode import decode_through_state
    from zoo.evaluate import PackEvaluation, load_slices
    from zoo.fit import Fit, Run
    from zoo.model import build_model

    torch.set_num_threads(1)
    load_plugins(setting.plugins)
    trial = Trial.model_validate(pack[0].trial)
    data = trial.data
    trial = trial.model_copy(update={"training": trial.training.model_copy(update={"batch_size": EXAMPLES})})
    train = load_slices(_few(data.train), data.seed, "train", setting.device)
    test = load_slices(_few(data.test), data.seed, "test", setting.device)
    runs = [Run(trial, build_model(trial.model, data, seed, setting.device)) for seed in (0, 1)]
    fit = Fit(runs, train, test, batched=setting.device.startswith("cuda"))
    for replay in fit.replays:
        replay()
    PackEvaluation(fit.pack, test, trial.training.dtype).run()
    decode_through_state(fit.pack, test, examples=2)


def _few(entries: Iterable[DataEntry]) -> list[DataEntry]:
    return [entry.model_copy(update={"examples": EXAMPLES}) for entry in entries]


if __name__ == "__main__":
    os.nice(10)
    some, its_setting = pickle.load(sys.stdin.buffer)
    for one in some:
        # What cannot be rehearsed fails again when it is run, and is recorded then.
        with contextlib.suppress(Exception):
            rehearse(one, its_setting)
