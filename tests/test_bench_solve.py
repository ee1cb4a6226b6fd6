"""zoo bench solve: its settings, when a trial has solved its task, its file."""

from __future__ import annotations

import csv

import pytest
from click.testing import CliRunner

from zoo.bench import peers, solve
from zoo.cli import main
from zoo.executors import Setting
from zoo.train import validate

SLICE = {"task": "mqar", "seq_len": 16, "num_pairs": 2, "vocab_size": 16, "examples": 64}
TINY = {
    "data": {"train": [SLICE], "test": [SLICE]},
    "model": {"d_model": 8, "layers": ["gated_conv"]},
    "optimizer": {"lr": 1e-2},
    "training": {"epochs": 3, "batch_size": 32, "stop_accuracy": 0.001},
}
HARD = {**TINY, "training": {"epochs": 2, "batch_size": 32, "stop_accuracy": 1.0}}


def bench(*arguments: object):
    return CliRunner().invoke(main, ["bench", "solve", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize("name", solve.SETTINGS)
def test_both_settings_ask_for_the_same_accuracy_on_the_same_task(name):
    trial = solve.seeded(solve.SETTINGS[name], 2)
    assert validate(trial) > 0
    assert trial.seed == trial.data.seed == 2
    assert trial.training.stop_accuracy == solve.GOAL == 0.99
    basic = solve.seeded(solve.SETTINGS["basic"], 0)
    assert trial.data.test == basic.data.test
    assert trial.data.train[0].options == basic.data.train[0].options


def test_it_counts_up_to_the_epoch_that_reached_the_goal():
    peer = peers.SOLVES["cpu"]
    line = solve.solve("tiny", solve.seeded(TINY, 0), Setting("cpu"), peer)
    assert (line.epochs, line.steps, line.examples) == (1, 2, 64)
    assert line.seconds is not None
    # The clock starts before the first epoch, which alone gives ms_step.
    assert line.seconds >= line.ms_step * line.steps / 1e3 > 0
    assert (line.peer_fastest_s, line.peer_slowest_s, line.peer_ms_step) == (112, 120, 54)
    hard = solve.solve("hard", solve.seeded(HARD, 0), Setting("cpu"), peer)
    assert (hard.seconds, hard.epochs, hard.steps) == (None, 2, 4)


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(solve, "SETTINGS", {"tiny": TINY, "hard": HARD})
    arguments = ["--device", "cpu", "--threads", 1, "--out", tmp_path]
    result = bench("--settings", "tiny", "--seeds", 2, *arguments)
    assert result.exit_code == 0
    assert "The peer, on 2 CPU cores: 112 to 120 s, 54 ms a step." in result.stdout
    assert [(row["setting"], row["seed"]) for row in rows(tmp_path)] == [("tiny", "0"), ("tiny", "1")]
    result = bench("--seeds", 1, *arguments)
    assert result.exit_code == 1
    assert "not solved" in result.stdout.splitlines()[-1]
    assert [row["seconds"] == "" for row in rows(tmp_path)] == [False, True]
    result = bench("--settings", "tinny", *arguments)
    assert result.exit_code == 2
    assert "no setting 'tinny'. Did you mean 'tiny'? Known: tiny, hard." in result.stderr


def rows(folder) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "solve.csv").read_text().splitlines()))
