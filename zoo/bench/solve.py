"""`zoo bench solve`: how long a trial takes to .99 validation accuracy, beside what a peer took."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from zoo.bench import peers
from zoo.bench.output import csv_lines, environment, save_environment
from zoo.config import Trial, parse
from zoo.errors import ConfigError, did_you_mean
from zoo.executors import Setting
from zoo.record import Epoch
from zoo.sweep import make_setting
from zoo.train import run_trial

GOAL = 0.99
_TASK = {"task": "mqar", "seq_len": 64, "num_pairs": 4, "vocab_size": 256, "random_filler": True}


def _mixture(examples: int) -> dict[str, Any]:
    return {"train": [{**_TASK, "examples": examples}], "test": [{**_TASK, "examples": 1000}]}


SETTINGS: dict[str, dict[str, Any]] = {
    # The peer's basic example, but without dropout, which a model here does not have, and with attention's other start.
    "basic": {
        "data": _mixture(10_000),
        "model": {
            "d_model": 64,
            "layers": [{"mixer": "attention", "init": "mimetic"}],
            "depth": 2,
            "mlp": {"expand": 4},
            "positions": "learned",
        },
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "schedule": "cosine_per_epoch", "clip": None},
        "training": {"epochs": 100, "batch_size": 64, "stop_accuracy": GOAL},
    },
    # The same task as this project would have it: one attention layer, with neighbours to look at.
    "recipe": {
        "data": _mixture(2_500),
        "model": {"d_model": 64, "layers": ["gated_conv", "attention"]},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
        "training": {"epochs": 40, "batch_size": 64, "stop_accuracy": GOAL},
    },
}


class SolveTime(NamedTuple):
    """One line of solve.csv: a trial up to the end of the epoch whose validation accuracy reached the goal.

    seconds: from the settings to there, data, start-up and every validation included; empty where the goal was not
    reached. ms_step: of training and validation. peer_fastest_s to peer_slowest_s: the peer's basic example, whatever
    the setting, on this kind of device.
    """

    setting: str
    seed: int
    seconds: float | None
    accuracy: float | None
    epochs: int
    steps: int
    examples: int
    ms_step: float
    peer_fastest_s: float
    peer_slowest_s: float
    peer_ms_step: float | None


@click.command("solve")
@click.option("--settings", help=f"{' or '.join(SETTINGS)}, comma-separated. Left out: both.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Trials of each, one by one.")
@click.option("--device", help="cpu or cuda. Left out: cuda where torch sees a GPU.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Left out: as many as torch would take.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench/solve"),
    show_default=True,
    help="Folder for the CSV file.",
)
@click.pass_context
def command(
    ctx: click.Context, settings: str | None, seeds: int, device: str | None, threads: int | None, out: Path
) -> None:
    """Train to .99 validation accuracy on a small recall task, and say how long that takes.

    `basic` is the peer's basic example, `recipe` this project's own recipe for the same task. The exit status is 1 when
    a trial does not get there.
    """
    names = list(SETTINGS) if settings is None else settings.split(",")
    for name in names:
        if name not in SETTINGS:
            raise ConfigError(f"no setting {name!r}.{did_you_mean(name, SETTINGS)} Known: {', '.join(SETTINGS)}.")
    setting = make_setting(device, threads or torch.get_num_threads(), ())
    out.mkdir(parents=True, exist_ok=True)
    click.echo(save_environment(out, environment(setting)))
    peer = peers.SOLVES["cuda" if setting.device.startswith("cuda") else "cpu"]
    step = f", {peer.step_ms} ms a step" if peer.step_ms else ""
    click.echo(f"The peer, on {peer.hardware}: {peer.fastest} to {peer.slowest} s{step}.")
    click.echo(TITLE)
    solved = True
    with csv_lines(out / "solve.csv") as add:
        for name in names:
            for seed in range(seeds):
                line = solve(name, seeded(SETTINGS[name], seed), setting, peer)
                add(line)
                click.echo(solve_text(line))
                solved = solved and line.seconds is not None
    ctx.exit(0 if solved else 1)


def seeded(plain: dict[str, Any], seed: int) -> Trial:
    """The trial of one seed, which is also the seed of its data: a seed does not profit from the one before."""
    return parse(Trial, {**plain, "data": {**plain["data"], "seed": seed}, "seed": seed}, "")


def solve(name: str, trial: Trial, setting: Setting, peer: peers.Solve) -> SolveTime:
    """Run a trial up to its stop_accuracy."""
    ended = clock = time.perf_counter()

    def on_epoch(_: Epoch) -> None:
        nonlocal ended
        ended = time.perf_counter()

    outcome = run_trial(trial, device=setting.device, threads=setting.threads, on_epoch=on_epoch)
    goal, accuracy = trial.training.stop_accuracy, outcome.validation_accuracy
    reached = goal is not None and accuracy is not None and accuracy >= goal
    return SolveTime(
        setting=name,
        seed=trial.seed,
        seconds=ended - clock if reached else None,
        accuracy=accuracy,
        epochs=len(outcome.history),
        steps=outcome.steps,
        examples=outcome.steps * trial.training.batch_size,
        ms_step=1e3 * sum(epoch.seconds for epoch in outcome.history) / outcome.steps,
        peer_fastest_s=peer.fastest,
        peer_slowest_s=peer.slowest,
        peer_ms_step=peer.step_ms,
    )


TITLE = (
    f"{'setting':10} {'seed':>4} {'seconds':>8} {'accuracy':>8} {'epochs':>6} {'steps':>6} {'examples':>9} "
    f"{'ms a step':>9}"
)


def solve_text(line: SolveTime) -> str:
    seconds = f"{line.seconds:8.1f}" if line.seconds is not None else f"{'-':>8}"
    accuracy = f"{line.accuracy:8.3f}" if line.accuracy is not None else f"{'-':>8}"
    return (
        f"{line.setting:10} {line.seed:4} {seconds} {accuracy} {line.epochs:6} {line.steps:6} {line.examples:9,} "
        f"{line.ms_step:9.2f}" + ("" if line.seconds is not None else "  not solved")
    )
