"""Rehearsals: a pack's steps on a few examples, in a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_cases import PLUGIN, plugin, sweep  # noqa: F401
from test_train import trial

from zoo.executors import Job, Setting
from zoo.rehearse import rehearse, rehearsing


def test_a_rehearsal_runs_all_of_a_pack_and_raises_what_it_would() -> None:
    rehearse((Job.of(trial()),), Setting())
    broken = trial().model_dump(mode="json")
    broken["model"]["layers"] = [{"mixer": "attention", "num_heads": 3}]
    with pytest.raises(Exception, match="not divisible by num_heads 3"):
        rehearse((Job("0" * 64, "broken", broken, {}),), Setting())


@pytest.mark.usefixtures("plugin")
def test_a_process_goes_on_after_a_pack_that_fails(tmp_path: Path) -> None:
    broken = Job("0" * 64, "broken", {}, {})
    (last,) = sweep(behaviour="exit_once", cured=str(tmp_path / "ran")).trials
    work = pickle.dumps(([(broken,), (Job.of(last),)], Setting(plugins=(PLUGIN,))))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "zoo.rehearse"]
    ended = subprocess.run(command, input=work, env=environment, check=False, timeout=120)
    # The last pack ends the process, in a way of its own.
    assert ended.returncode == 7
    assert (tmp_path / "ran").exists()


def test_a_cpu_has_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("started a process"))
    with rehearsing([(Job.of(trial()),)] * 3, Setting()):
        pass


def test_processes_end_with_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], stdin=subprocess.PIPE)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    with rehearsing([(Job.of(trial()),)] * 3, Setting(device="cuda")):
        assert len(started) == 2
    assert all(child.returncode is not None for child in started)
