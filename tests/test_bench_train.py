"""zoo bench train, without a GPU: its settings, what it counts as what, its files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

import zoo
from zoo.bench import peers, train
from zoo.bench.settings import MODELS, choose, figure2_packs, grid_packs, lasting
from zoo.bench.train import StepTime, Work, covered, mean, pack_text, step_text, time_pack
from zoo.cli import main
from zoo.config import Sweep
from zoo.errors import ConfigError
from zoo.executors import Setting

CPU = Setting("cpu")
EXPERIMENTS = Path(zoo.__file__).parent.parent / "experiments"
SLICE = {"task": "mqar", "seq_len": 16, "num_pairs": 2, "vocab_size": 16}
TINY = {
    "data": {
        "train": [{**SLICE, "examples": 96}, {**SLICE, "seq_len": 24, "examples": 40}],
        "test": [{**SLICE, "examples": 32}],
    },
    "model": {"d_model": 8},
    "optimizer": {"lr": [1e-3, 1e-2, 1e-1]},
    "training": {"epochs": 3, "batch_size": 32},
    "variants": [{"model": {"layers": ["gated_conv"]}}, {"model": {"layers": ["gated_conv", "attention"]}}],
}


@pytest.fixture
def grid(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return str(file)


def bench(*arguments: object):
    return CliRunner().invoke(main, ["bench", "train", *map(str, arguments)], catch_exceptions=False)


def lines(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_named_settings_are_trials_of_the_published_grid():
    published = {trial.model_dump_json() for trial in Sweep.load(EXPERIMENTS / "based_figure2.yaml").trials}
    ours = {name: {trial.model_dump_json() for trial in trials} for name, trials in figure2_packs(8).items()}
    assert [name for name, trials in ours.items() if not trials <= published] == []
    assert all(len(trials) == 8 for trials in ours.values())


def test_the_peer_was_measured_on_named_settings():
    assert set(peers.RUNS) < set(MODELS)
    slices = {(e.options.seq_len, e.options.num_pairs) for e in figure2_packs(1)["hyena-d128"][0].data.train}
    assert all(set(run.step_ms) < slices for run in peers.RUNS.values())


def test_a_grid_gives_one_setting_for_what_trains_together(grid):
    packs = grid_packs(grid, 2)
    assert {name: [t.optimizer.lr for t in trials] for name, trials in packs.items()} == {
        "gated_conv-d=8": [1e-3, 1e-2],
        "attention-d=8": [1e-3, 1e-2],
    }


def test_settings_by_name_or_beginning():
    packs = figure2_packs(1)
    assert list(choose(packs, "hyena-d128,mamba")) == ["hyena-d128", "mamba2-d128-s16", "mamba-d128-s16"]
    with pytest.raises(ConfigError, match=r"no setting 'heyna-d128'\. Did you mean 'hyena-d128'"):
        choose(packs, "heyna-d128")


def test_every_trial_runs_to_its_last_epoch(grid):
    (trial,) = grid_packs(grid, 1)["attention-d=8"]
    assert trial.training.stop_accuracy is not None
    assert lasting(trial, None).training == trial.training.model_copy(update={"stop_accuracy": None})
    assert lasting(trial, 5).training.epochs == 5
    with pytest.raises(ConfigError, match="use --epochs 2 or more"):
        lasting(trial, 1)


# --- what counts as what ---------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch, grid):
    """A pack of two whose seconds are given: of data, of each epoch (number, seconds), of evaluation."""
    (trials,) = (packs for name, packs in grid_packs(grid, 2).items() if name == "attention-d=8")
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock.now)

    def run(data: float, epochs: list[tuple[int, float]], evaluation: float, peer: peers.Run | None = None):
        def run_pack(trials, *, device, threads, on_epoch):
            clock.now += data
            for number, seconds in epochs:
                clock.now += seconds
                for i in range(len(trials)):
                    on_epoch(i, SimpleNamespace(epoch=number))
            clock.now += evaluation
            timing = SimpleNamespace(data=data / 2, evaluate=evaluation / 2)
            return [SimpleNamespace(timing=timing, status=status) for status in ("ok", "diverged")]

        monkeypatch.setattr(train, "run_pack", run_pack)
        return time_pack("name", "first", trials, CPU, peer)

    return run


def test_the_first_epoch_beyond_the_others_is_start_up(fake):
    line = fake(1.0, [(0, 7.0), (1, 2.0), (2, 2.0)], 3.0)
    assert (line.data_s, line.start_s, line.train_s, line.evaluate_s) == (1.0, 5.0, 6.0, 3.0)
    assert (line.total_s, line.trial_s, line.epoch_s) == (15.0, 7.5, 2.0)
    assert (line.trials, line.epochs, line.diverged, line.ratio) == (2, 3, 1, None)
    # On a busy machine the others may take longer.
    line = fake(1.0, [(0, 2.0), (1, 5.0), (2, 5.0)], 3.0)
    assert (line.start_s, line.train_s, line.epoch_s) == (0.0, 12.0, 5.0)


def test_packs_that_memory_splits_each_have_a_start_up(fake):
    line = fake(0.0, [(0, 4.0), (1, 1.0), (0, 3.0), (1, 1.0)], 0.5)
    assert (line.start_s, line.train_s, line.evaluate_s) == (5.0, 4.0, 0.5)


def test_without_a_second_epoch_there_is_nothing_to_tell(fake):
    with pytest.raises(ConfigError, match="use lower learning rates"):
        fake(1.0, [(0, 1.0)], 1.0)


def test_the_peer_counts_for_as_many_epochs_and_on_its_hardware_only(fake, monkeypatch):
    peer = peers.Run(320.0, {}, 0)
    line = fake(0.0, [(0, 1.0), (1, 1.0), (2, 1.0)], 1.0, peer)
    assert (line.peer_s, line.ratio) == (30.0, None)
    monkeypatch.setattr(train, "hardware", lambda device: peers.GPU)
    line = fake(0.0, [(0, 1.0), (1, 1.0), (2, 1.0)], 1.0, peer)
    assert (line.trial_s, line.ratio) == (2.0, 15.0)


def test_the_mean_step_weighs_slices_by_their_steps():
    assert mean([Work(1.0), Work(4.0)], [2, 1]) == Work(2.0)
    assert mean([Work(1.0, 0.5, 10), Work(4.0, 2.0, 40)], [2, 1]) == Work(2.0, 1.0, 20)


def test_kernels_beside_each_other_count_once():
    assert covered([]) == 0
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0


def test_what_is_printed_of_a_step():
    line = StepTime("name", 4, "T=64 n=4", 390, 2.0, 0.5, 2000.0, 512000.0, 0.9, 96, 6.0, 12.0)
    assert "2,000.0 steps/s,   512,000 examples/s; GPU busy  90%, 96 kernels; peer 6.00 ms, ratio 12.0" in step_text(
        line
    )
    assert step_text(line._replace(busy=None, peer_ms=None, ratio=None)).endswith("examples/s")
    assert "runs/s" in step_text(line._replace(slice="validation"))


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_grid_on_a_cpu(grid, tmp_path):
    result = bench("--grid", grid, "--pack", 2, "--warm", "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    packs, steps = lines(tmp_path / "out" / "train.csv"), lines(tmp_path / "out" / "steps.csv")
    assert [(p["setting"], p["pack"], p["epochs"]) for p in packs] == [
        ("gated_conv-d=8", "first", "2"),
        ("gated_conv-d=8", "warm", "3"),
        ("attention-d=8", "first", "2"),
        ("attention-d=8", "warm", "3"),
    ]
    for p in packs:
        parts = [float(p[part]) for part in ("data_s", "start_s", "train_s", "evaluate_s")]
        assert sum(parts) == pytest.approx(float(p["total_s"]), rel=1e-4)
        assert float(p["trial_s"]) == pytest.approx(float(p["total_s"]) / 2, rel=1e-4)
        assert p["peer_s"] == p["ratio"] == p["peak_mib"] == ""
        assert p["setting"] in result.stdout
    assert [(s["slice"], s["per_epoch"]) for s in steps[:4]] == [
        ("T=16 n=2 V=16", "3"),
        ("T=24 n=2 V=16", "1"),
        ("all", "4"),
        ("validation", "1"),
    ]
    short, long, every, _ = (float(s["ms"]) for s in steps[:4])
    assert every == pytest.approx((3 * short + long) / 4, rel=1e-4)
    assert float(steps[0]["examples_per_s"]) == pytest.approx(2 * 32 * 1e3 / short, rel=1e-4)
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert {"hardware", "torch", "python", "zoo"} <= set(environment)


def test_a_pack_that_fails_does_not_cost_the_others_their_figures(grid, tmp_path, monkeypatch):
    real = train.run_pack

    def run_pack(trials, **options):
        if trials[0].model.family == "gated_conv":
            raise MemoryError("too large")
        return real(trials, **options)

    monkeypatch.setattr(train, "run_pack", run_pack)
    result = bench("--grid", grid, "--pack", 1, "--no-steps", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 1
    assert "gated_conv-d=8 failed: MemoryError: too large" in result.stderr
    assert [line["setting"] for line in lines(tmp_path / "train.csv")] == ["attention-d=8"]


def test_what_cannot_run_is_said_before_anything_runs(grid, tmp_path):
    for arguments, message in (
        (["--grid", "none.yaml"], "sweep file 'none.yaml' does not exist"),
        (["--grid", grid, "--settings", "hyena"], "no setting 'hyena'. Known: gated_conv-d=8, attention-d=8."),
        (["--device", "toaster"], "unknown device 'toaster'; use cpu or cuda."),
    ):
        result = bench(*arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_commands_are_listed_without_importing_anything_heavy():
    code = (
        "import sys; from zoo.cli import main; main(['bench', '--help'], standalone_mode=False); "
        "print(sorted({'torch', 'triton', 'zoo.bench'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in ("kernels", "solve", "train"))
    assert result.stdout.splitlines()[-1] == "[]"
    assert bench("--help").exit_code == 0


def test_what_is_printed_of_a_pack_lines_up_with_its_title(fake):
    line = fake(0.0, [(0, 1.0), (1, 1.0), (2, 1.0)], 1.0, peers.Run(320.0, {}, 0))
    title, text = train.PACK_TITLE, pack_text(line._replace(peak_mib=1234.0, ratio=15.0, diverged=0))
    assert len(title) == len(text)
    assert " ".join(text.split()) == "name first 2 3 0.00 0.00 3.00 1.00 4.00 2.00 30.00 15.0 1234"
    assert pack_text(line).endswith("1 diverged")
