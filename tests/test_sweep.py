"""Sweeps on both executors: the same records, nothing twice, nothing lost, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweep_cases import PLUGIN, grid, plugin, sweep  # noqa: F401

import zoo.executors
import zoo.sweep
from zoo.config import Sweep
from zoo.errors import ConfigError, PluginError, RecordError, UnsupportedError
from zoo.executors import Job, Setting, execute, import_ray, start_ray
from zoo.record import Record
from zoo.results import RunStore
from zoo.sweep import PlanWarning, plan_sweep, run_sweep

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture(scope="module")
def ray_session():
    """One Ray for the module: a sweep that finds Ray running uses it."""
    ray = import_ray()
    start_ray(ray, Setting(), workers=2)
    yield ray
    ray.shutdown()


def run(trials: Sweep, folder: Path, executor: str = "inline", **options):
    return run_sweep(trials, folder, executor=executor, device="cpu", plugins=[PLUGIN], progress=False, **options)


def records(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (folder / "records").glob("*.json")}


def kinds(summary) -> list[str]:
    return sorted(record.status for record in summary.done)


# --- one sweep -------------------------------------------------------------------------------------------------------


def test_twice_the_same_sweep_runs_nothing_and_a_wider_one_only_what_is_new(tmp_path):
    first = run(sweep(lr=[0.01, 0.02]), tmp_path)
    assert kinds(first) == ["ok", "ok"]
    assert first.exit_code == 0
    before = records(tmp_path)

    again = run(sweep(lr=[0.01, 0.02]), tmp_path)
    assert not again.done
    assert len(again.earlier) == 2
    assert records(tmp_path) == before

    wider = run(sweep(lr=[0.01, 0.02, 0.03]), tmp_path)
    assert len(wider.done) == 1
    assert before.items() <= records(tmp_path).items()
    assert len(records(tmp_path)) == 3


def test_records_of_known_runs_are_copied_instead_of_run_again(tmp_path):
    run(sweep(lr=[0.01, 0.02]), tmp_path / "first")
    second = run(sweep(lr=[0.02, 0.03]), tmp_path / "second", known=[tmp_path / "first"])
    assert len(second.done) == 1
    assert len(second.earlier) == 1
    mine, theirs = records(tmp_path / "second"), records(tmp_path / "first")
    assert len(mine) == 2
    (shared,) = mine.keys() & theirs.keys()
    assert mine[shared] == theirs[shared]


def test_a_failed_record_of_a_known_run_does_not_count(tmp_path):
    store = RunStore(tmp_path / "first", create=True)
    failed = sweep(lr=[0.01]).trials[0]
    run(sweep(lr=[0.01]), store.path)
    record = store.get(failed.key)
    store.write(record.model_copy(update={"status": "failed", "outcome": None}))
    assert kinds(run(sweep(lr=[0.01]), tmp_path / "second", known=[store.path])) == ["ok"]


def test_a_record_holds_the_trial_and_how_it_ran(tmp_path):
    trials = sweep(lr=0.01)
    (record,) = run(trials, tmp_path).done
    assert record == RunStore(tmp_path).get(record.key)
    assert record.key == trials.trials[0].key
    assert record.trial == trials.trials[0].model_dump(mode="json")
    assert record.versions == trials.trials[0].versions
    assert [epoch.epoch for epoch in record.outcome.history] == [0, 1]
    about = record.provenance
    assert (about.executor, about.device, about.threads, about.attempt) == ("inline", "cpu", 1, 1)
    assert about.seconds > 0
    assert about.git is None or len(about.git.removesuffix("+dirty")) == 40
    assert RunStore(tmp_path).read_sweep()["keys"] == [record.key]


def test_a_failed_trial_leaves_its_traceback_and_the_others_go_on(tmp_path):
    trials = sweep(behaviour=["raise", "diverge", "good"], cured=str(tmp_path / "cured"))
    summary = run(trials, tmp_path / "run")
    assert kinds(summary) == ["diverged", "failed", "ok"]
    assert summary.exit_code == 1
    (failed,) = summary.failed
    assert failed.failure.error == "RuntimeError"
    assert failed.failure.message == "this mixer always raises"
    assert "sweep_plugin.py" in failed.failure.traceback
    assert failed.outcome is None
    text = str(summary)
    assert f"failed {failed.key[:8]}" in text
    assert "RuntimeError: this mixer always raises" in text
    assert "--retry-failed" in text


def test_a_failed_trial_runs_again_only_when_asked(tmp_path):
    trials = sweep(behaviour=["raise", "good"], cured=str(tmp_path / "cured"))
    assert run(trials, tmp_path / "run").exit_code == 1

    (tmp_path / "cured").touch()
    skipped = run(trials, tmp_path / "run")
    assert not skipped.done
    assert len(skipped.failed) == 1
    assert skipped.exit_code == 1

    retried = run(trials, tmp_path / "run", retry_failed=True)
    assert kinds(retried) == ["ok"]
    assert retried.exit_code == 0
    assert not run(trials, tmp_path / "run", retry_failed=True).done


def test_a_plugin_that_exits_does_not_end_an_inline_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.train.run_pack", lambda *args, **kwargs: sys.exit("enough"))
    summary = run(sweep(), tmp_path)
    assert summary.failed[0].failure.error == "SystemExit"


def test_the_number_of_threads_is_the_callers_again_afterwards(tmp_path):
    import torch

    before = torch.get_num_threads()
    (record,) = run(sweep(), tmp_path, threads=before + 1).done
    assert record.provenance.threads == before + 1
    assert torch.get_num_threads() == before


def test_models_that_cannot_be_built_are_all_told_before_anything_runs(tmp_path):
    data = grid(d_model=[8, 6])
    data["model"]["layers"] = ["running_mean", {"mixer": "attention", "num_heads": [1, 4, 5]}]
    with pytest.raises(ConfigError) as caught:
        run(Sweep.from_dict(data), tmp_path / "run")
    assert "d_model 6 is not divisible by num_heads 4" in str(caught.value)
    assert "d_model 8 is not divisible by num_heads 5" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_fault_that_many_models_share_is_told_once(tmp_path):
    data = grid(d_model=[8, 16, 24])
    data["training"]["batch_size"] = 128
    with pytest.raises(
        ConfigError, match=r"^running_mean d=8 .* and 2 other models: .* fewer than one batch of 128.*\Z"
    ):
        plan_sweep(Sweep.from_dict(data), tmp_path)


def test_a_mixer_that_cannot_be_built_is_a_failed_trial_and_the_others_go_on(tmp_path):
    trials = sweep(behaviour=["raise_in_init", "good"])
    with pytest.warns(PlanWarning, match="running_mean d=8 .* will fail, .* RuntimeError: this mixer cannot be built"):
        plan = plan_sweep(trials, tmp_path, every=True)
    assert [p.will_run for p in plan] == [True, True]
    with pytest.warns(PlanWarning):
        summary = run(trials, tmp_path)
    assert kinds(summary) == ["failed", "ok"]
    assert summary.failed[0].failure.message == "this mixer cannot be built"


def test_a_task_that_cannot_be_drawn_is_a_failed_trial(tmp_path):
    data = grid()
    data["data"]["train"] = [{"task": "first_token", "examples": 64, "vocab_size": [0, 8]}]
    with pytest.warns(PlanWarning, match="will fail"):
        assert kinds(run(Sweep.from_dict(data), tmp_path)) == ["failed", "ok"]


def test_two_sweeps_cannot_write_to_one_run_folder(tmp_path):
    with RunStore(tmp_path, create=True).lock(), pytest.raises(RecordError, match=f"process {os.getpid()} on"):
        run(sweep(), tmp_path)
    assert kinds(run(sweep(), tmp_path)) == ["ok"]


def test_what_another_sweep_has_written_since_the_plan_is_not_run_again(tmp_path, monkeypatch):
    def plan_then_lose_the_race(*arguments, **settings):
        plan = plan_sweep(*arguments, **settings)
        monkeypatch.undo()
        run(sweep(lr=[0.01, 0.02]), tmp_path)
        return plan

    monkeypatch.setattr(zoo.sweep, "plan_sweep", plan_then_lose_the_race)
    summary = run(sweep(lr=[0.01, 0.02, 0.03]), tmp_path)
    assert (len(summary.done), len(summary.earlier)) == (1, 2)


def test_a_failure_that_another_sweep_has_mended_since_the_plan_is_not_run_again(tmp_path, monkeypatch):
    trials = sweep()
    (good,) = run(trials, tmp_path).done
    failure = {"error": "OSError", "message": "full", "traceback": ""}
    failed = good.model_dump(mode="json") | {"status": "failed", "outcome": None, "failure": failure}
    RunStore(tmp_path).write(Record.model_validate(failed))

    def plan_then_lose_the_race(*arguments, **settings):
        plan = plan_sweep(*arguments, **settings)
        monkeypatch.undo()
        RunStore(tmp_path).write(good)
        return plan

    monkeypatch.setattr(zoo.sweep, "plan_sweep", plan_then_lose_the_race)
    summary = run(trials, tmp_path, retry_failed=True)
    assert (summary.done, summary.earlier) == ((), (good,))


def test_a_corrupt_record_is_set_aside_and_its_trial_runs_again(tmp_path):
    trials = sweep(lr=[0.01, 0.02])
    run(trials, tmp_path)
    spoilt = tmp_path / "records" / f"{trials.trials[0].key}.json"
    spoilt.write_text(spoilt.read_text()[:100])
    with pytest.warns(match=spoilt.name):
        again = run(trials, tmp_path)
    assert [record.key for record in again.done] == [trials.trials[0].key]
    assert (tmp_path / "corrupt" / spoilt.name).exists()


def test_a_plan_knows_what_will_run_and_what_it_costs(tmp_path):
    run(sweep(d_model=8, behaviour=["good", "raise"]), tmp_path)
    trials = sweep(d_model=[8, 32], behaviour=["good", "raise"])
    plan = plan_sweep(trials, tmp_path, every=True)
    assert [p.will_run for p in plan] == [False, False, True, True]
    assert [p.record.status if p.record else None for p in plan] == ["ok", "failed", None, None]
    assert [p.will_run for p in plan_sweep(trials, tmp_path, retry_failed=True)] == [False, True, True, True]

    small, _, large, _ = plan
    # Two epochs of 64 examples of 8 tokens. W, two norms; embeddings count where an answer is asked.
    assert small.cost.tokens == 2 * 64 * 8
    assert small.cost.parameters == 8 * 8 + (8 * 8 + 8) + 4 * 8
    assert small.cost.flops == 6 * (1024 * (8 * 8 + 8 + 32) + 2 * 64 * 8 * 8)
    # Time goes as the finished trial's.
    assert large.seconds == pytest.approx(small.record.provenance.seconds * large.cost.flops / small.cost.flops)
    assert plan_sweep(trials, tmp_path / "none")[0].seconds is None


def test_long_trials_start_first(tmp_path):
    summary = run(sweep(d_model=[8, 32, 16]), tmp_path)
    assert [record.trial["model"]["d_model"] for record in summary.done] == [32, 16, 8]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"executor": "slurm"}, ConfigError, "unknown executor 'slurm'; use one of auto, ray, inline"),
        ({"workers": 0}, ConfigError, "workers 0 must be at least 1"),
        ({"threads": 0}, ConfigError, "threads 0 must be from 1 to 1024"),
        ({"threads": 10**5}, ConfigError, "threads 100000 must be from 1 to 1024"),
        ({"executor": "inline", "workers": 2}, ConfigError, "2 workers need Ray"),
        ({"device": "gpu"}, ConfigError, "unknown device 'gpu'"),
        ({"executor": "ray", "device": "cuda:1"}, ConfigError, "'cuda:1' cannot be used on Ray"),
    ],
)
def test_bad_arguments(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run_sweep(sweep(), tmp_path / "run", progress=False, plugins=[PLUGIN], **options)
    assert not records(tmp_path / "run")


def test_a_device_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=r"torch .* sees no GPU; use --device cpu"):
        run_sweep(sweep(), tmp_path, device="cuda", executor="inline")


def test_without_ray_the_error_says_the_remedy_and_auto_goes_inline(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'zoo-mixers\[ray\]'.*--executor inline"):
        run(sweep(), tmp_path, "ray")
    summary = run(sweep(lr=[0.01, 0.02]), tmp_path, "auto")
    assert {record.provenance.executor for record in summary.done} == {"inline"}


def test_a_worker_with_other_code_says_so():
    job = Job.of(sweep().trials[0])
    other = Job("0" * 64, job.label, job.trial, job.versions | {"engine": "0"})
    (record,) = execute((other,), Setting(plugins=(PLUGIN,)))
    assert record.status == "failed"
    assert "the worker's code differs from the driver's" in record.failure.message


# --- interrupted -----------------------------------------------------------------------------------------------------


class Interrupting(zoo.progress.Silent):
    """Presses Ctrl-C when two trials are done."""

    def finished(self, job, record):
        super().finished(job, record)
        if self.done == 2:
            raise KeyboardInterrupt


def interrupt(monkeypatch):
    monkeypatch.setattr("zoo.sweep.make_progress", lambda name, jobs, enabled: Interrupting(name, jobs))


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path, monkeypatch):
    trials = sweep(lr=[0.01, 0.02, 0.03, 0.04])
    with monkeypatch.context() as patch:
        interrupt(patch)
        summary = run(trials, tmp_path)
    assert summary.interrupted
    assert summary.exit_code == 130
    assert "Interrupted with 2 trials to go; the same command goes on from here." in str(summary)
    before = records(tmp_path)
    assert len(before) == 2
    rest = run(trials, tmp_path)
    assert len(rest.done) == 2
    assert before.items() <= records(tmp_path).items()


DRIVER = """
import json, sys
from zoo import Sweep, run_sweep
from zoo.registry import load_file

plugin, grid, folder, executor = sys.argv[1:]
if executor == "inline":
    sys.modules["ray"] = None  # must not be needed
load_file(plugin)
run_sweep(Sweep.from_dict(json.loads(grid)), folder, executor=executor, device="cpu", plugins=[plugin], workers=None)
"""


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_kill_9_of_the_driver_then_the_same_sweep(tmp_path, executor, request):
    settings = grid(lr=[0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08], seconds=0.05)
    root = str(Path(zoo.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, PLUGIN, json.dumps(settings), str(tmp_path), executor],
        # Not the checkout: workers must find zoo, too.
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(records(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    before = records(tmp_path)
    assert 3 <= len(before) < 8

    if executor == "ray":
        request.getfixturevalue("ray_session")
    trials = Sweep.from_dict(settings)
    summary = run(trials, tmp_path, executor)
    assert {record.key for record in summary.done} == {trial.key for trial in trials.trials} - before.keys()
    assert kinds(summary) == ["ok"] * (8 - len(before))
    assert before.items() <= records(tmp_path).items()
    assert records(tmp_path).keys() == {trial.key for trial in trials.trials}


# --- on Ray ----------------------------------------------------------------------------------------------------------


def without_times(record):
    data = record.model_dump(mode="json", exclude={"provenance": True, "outcome": {"timing": True}})
    for epoch in (data["outcome"] or {}).get("history", ()):
        del epoch["seconds"]
    if data["failure"]:
        # Its frames differ in who called.
        data["failure"]["traceback"] = data["failure"]["traceback"].splitlines()[-1]
    return data


@pytest.mark.usefixtures("ray_session")
def test_both_executors_give_the_same_records_to_the_last_bit(tmp_path):
    """The plugin's task and mixer are there on Ray, too, and so are a failure and a divergence."""
    settings = grid(lr=[0.01, 0.1], behaviour=["good", "raise", "diverge"], d_model=32, epochs=3)
    settings["model"]["layers"].append({"mixer": "attention", "num_heads": 2})
    trials = Sweep.from_dict(settings)
    inline, on_ray = run(trials, tmp_path / "inline"), run(trials, tmp_path / "ray", "ray")
    assert kinds(inline) == ["diverged"] * 2 + ["failed"] * 2 + ["ok"] * 2
    assert {r.provenance.executor for r in on_ray.done} == {"ray"}
    left, right = ({r.key: without_times(r) for r in summary.done} for summary in (inline, on_ray))
    assert left == right
    losses = [r.outcome.test[0].loss for r in inline.done if r.status == "ok"]
    assert losses[0] != losses[1]


@pytest.mark.usefixtures("ray_session")
def test_a_trial_whose_worker_dies_is_tried_again_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo.executors, "ATTEMPTS", 2)
    once = grid(behaviour="exit_once", cured=str(tmp_path / "cured"))
    never, good = grid(behaviour="exit"), grid(lr=[0.01, 0.02])
    variants = [{"model": s["model"], "optimizer": s["optimizer"]} for s in (never, once, good)]
    summary = run(Sweep.from_dict(grid() | {"variants": variants}), tmp_path / "run", "ray")
    assert kinds(summary) == ["failed", "ok", "ok", "ok"]
    by_behaviour = {r.trial["model"]["layers"][0]["behaviour"]: r for r in summary.done}
    assert by_behaviour["exit_once"].provenance.attempt == 2
    dead = by_behaviour["exit"]
    assert dead.failure.error == "WorkerDied"
    assert dead.provenance.attempt == 2
    assert "the worker process died (WorkerCrashedError) in each of 2 attempts" in dead.failure.message
    assert "--executor inline" in dead.failure.message


@pytest.mark.usefixtures("ray_session")
def test_a_plugin_that_a_worker_cannot_load_is_a_failed_trial(tmp_path):
    summary = run_sweep(
        sweep(), tmp_path, executor="ray", device="cpu", plugins=["no_such_module_of_mine"], progress=False
    )
    assert summary.failed[0].failure.error == PluginError.__name__
    assert "no_such_module_of_mine" in summary.failed[0].failure.message


@pytest.mark.usefixtures("ray_session")
def test_more_threads_than_ray_has_cpus(tmp_path):
    with pytest.raises(ConfigError, match="64 threads a trial, but Ray has 2 CPUs"):
        run(sweep(), tmp_path, "ray", threads=64)


@pytest.mark.usefixtures("ray_session")
def test_ctrl_c_on_ray(tmp_path, monkeypatch):
    trials = sweep(lr=[0.01, 0.02, 0.03, 0.04, 0.05, 0.06], seconds=0.02)
    with monkeypatch.context() as patch:
        interrupt(patch)
        summary = run(trials, tmp_path, "ray")
    assert summary.interrupted
    assert len(summary.done) == 2
    assert len(run(trials, tmp_path).done) == 4
