"""`zoo bench kernels`: the fused ops against their peers, plain torch and what the hardware allows. Needs a GPU."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from zoo.bench.case import Case, Draw, Op, Shape, select
from zoo.bench.check import DTYPES, MANY_ELEMENTS, MANY_HEADS, Result, check_large, check_seeds
from zoo.bench.timing import Pass, copy_bandwidth, eager_ms, graph_ms, matmul_rate, number_of_sets
from zoo.errors import ConfigError, UnsupportedError
from zoo.kernels.launch import Config, forced
from zoo.testing.ops import run_op

_COMPILERS = 12
# case, shape, dtype, and a kernel with the config to try for it.
Job = tuple[str, Shape, torch.dtype, str | None, Config | None]


class Timing(NamedTuple):
    """One line of kernels.csv. ms is None where the op refused, and why says so."""

    case: str
    shape: Shape
    dtype: str
    which: str
    mode: str
    who: str
    ms: float | None
    bytes_ms: float
    flops_ms: float
    why: str = ""

    @property
    def floor_ms(self) -> float:
        return max(self.bytes_ms, self.flops_ms)


class Trial(NamedTuple):
    """One line of sweep.csv: a case with another config of one of its kernels."""

    case: str
    shape: Shape
    kernel: str
    config: Config
    ms: float | None
    why: str = ""


class Clock:
    def __init__(self, budget: float) -> None:
        self._end = time.monotonic() + budget

    def left(self) -> bool:
        return time.monotonic() < self._end


@click.command("kernels")
@click.option("--ops", help="Cases to run, by name or beginning, comma-separated. Default: all.")
@click.option("--shapes", help="Such as B256_T256_H1_D64, comma-separated. Default: each case's own.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench"), help="Folder for the CSV files.")
@click.option("--time/--no-time", "timed", default=True, help="Measure times.")
@click.option("--peers/--no-peers", default=True, help="Measure peers where they are installed.")
@click.option("--eager/--no-eager", default=True, help="Also measure calls from Python, without a graph.")
@click.option("--check", "seeds", is_flag=False, flag_value=20, default=0, help="Compare with fp64, for so many seeds.")
@click.option("--dtypes", default="bfloat16,float16,float32", help="Dtypes for --check.")
@click.option("--large", is_flag=True, help="Check more heads and more elements than 16 and 32 bits can index.")
@click.option("--sweep-configs", is_flag=True, help="Time each case's other configs instead.")
@click.option("--budget-seconds", type=float, default=3600.0, help="Start nothing new after so long.")
def command(
    ops: str | None,
    shapes: str | None,
    out: Path,
    timed: bool,
    peers: bool,
    eager: bool,
    seeds: int,
    dtypes: str,
    large: bool,
    sweep_configs: bool,
    budget_seconds: float,
) -> None:
    """Time the fused ops beside their peers, plain torch and the floor; with --check, also compare them with fp64."""
    if not torch.cuda.is_available():
        raise UnsupportedError("zoo bench kernels needs a CUDA GPU; torch finds none.")
    clock = Clock(budget_seconds)
    cases = select(ops)
    chosen = None if shapes is None else tuple(parse_shape(s) for s in shapes.split(","))
    checked = parse_dtypes(dtypes) if seeds else ()
    out.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for case in cases:
        for shape in chosen or case.shapes:
            jobs += [(case.name, shape, d, None, None) for d in dict.fromkeys((torch.bfloat16, *checked))]
            if sweep_configs:
                tried = case.configs(shape).items()
                jobs += [(case.name, shape, torch.bfloat16, k, config) for k, configs in tried for config in configs]
    compile_all(jobs)
    environment = {**versions(), "copy_bytes_per_s": copy_bandwidth(), "matmul_flops_per_s": matmul_rate()}
    (out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    click.echo(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in environment.items()))
    failed = False
    if seeds or large:
        results = list(checks(cases, chosen, checked, seeds, large, clock))
        write(out / "checks.csv", results)
        failed = not all(r.passed for r in results)
    if sweep_configs:
        write(out / "sweep.csv", list(sweep(cases, chosen, clock)))
    elif timed:
        write(out / "kernels.csv", list(timings(cases, chosen, peers, eager, environment, clock)))
    if not clock.left():
        click.echo(f"The budget of {budget_seconds:g} s was spent; what is missing above was not run.")
    if failed:
        raise SystemExit(1)


def timings(
    cases: Sequence[Case],
    shapes: Sequence[Shape] | None,
    peers: bool,
    eager: bool,
    environment: dict[str, Any],
    clock: Clock,
) -> Iterator[Timing]:
    """Every case and shape, forward and both: ours, each peer, plain torch; printed as they come."""
    click.echo(f"{'case':32} {'shape':18} {'pass':8} {'mode':6} {'who':28} {'ms':>8} {'x ours':>7} {'x floor':>8}")
    for case in cases:
        contenders: dict[str, Callable[[], Op]] = {"zoo": lambda case=case: case.ours}  # type: ignore[misc]
        if peers:
            contenders |= case.peers
        if case.torch is not None:
            contenders["torch"] = lambda case=case: case.torch  # type: ignore[misc]
        for shape in shapes or case.shapes:
            ours: dict[tuple[str, str], float] = {}
            for who, load in contenders.items():
                if not clock.left():
                    return
                for t in time_one(case, shape, who, load, eager, environment):
                    if who == "zoo" and t.ms is not None:
                        ours[t.which, t.mode] = t.ms
                    mine = ours.get((t.which, t.mode))
                    ratio = f"{t.ms / mine:7.2f}" if t.ms and mine else f"{'':7}"
                    figures = f"{t.ms:8.4f} {ratio} {t.ms / t.floor_ms:8.2f}" if t.ms else t.why
                    click.echo(f"{t.case:32} {t.shape!s:18} {t.which:8} {t.mode:6} {t.who:28} {figures}")
                    yield t


def time_one(
    case: Case, shape: Shape, who: str, load: Callable[[], Op], eager: bool, environment: dict[str, Any]
) -> Iterator[Timing]:
    try:
        op = load()
    except ImportError:
        return
    sets = [case.inputs(shape, Draw("cuda", torch.bfloat16, 0))]
    sets += [case.inputs(shape, Draw("cuda", torch.bfloat16, seed)) for seed in range(1, number_of_sets(sets[0]))]
    for which, cost in (("fwd", case.forward(shape)), ("fwdbwd", case.both(shape))):
        floors = (
            1e3 * cost.bytes() / environment["copy_bytes_per_s"],
            1e3 * cost.flops / environment["matmul_flops_per_s"],
        )
        modes = [("graph", graph_ms)] + ([("eager", eager_ms)] if eager else [])
        for mode, measure in modes:
            ms, why = attempt(lambda which=which, measure=measure: measure(Pass(op, sets, which == "fwdbwd")))  # type: ignore[misc]
            yield Timing(case.name, shape, "bfloat16", which, mode, who, ms, *floors, why)


def sweep(cases: Sequence[Case], shapes: Sequence[Shape] | None, clock: Clock) -> Iterator[Trial]:
    """Each kernel of each case with each of its configs, the other kernels as their rules have it."""
    for case in cases:
        for shape in shapes or case.shapes:
            inputs = [case.inputs(shape, Draw("cuda", torch.bfloat16, 0))]
            inputs += [case.inputs(shape, Draw("cuda", torch.bfloat16, s)) for s in range(1, number_of_sets(inputs[0]))]
            for kernel, configs in case.configs(shape).items():
                work = Pass(case.ours, inputs, kernel.endswith("backward"))
                trials = []
                usual, _ = attempt(lambda work=work: graph_ms(work))  # type: ignore[misc]
                for config in configs:
                    if not clock.left():
                        return
                    with forced(kernel, config):
                        ms, why = attempt(lambda work=work: graph_ms(work))  # type: ignore[misc]
                    trials.append(Trial(case.name, shape, kernel, config, ms, why))
                click.echo(f"{case.name} {shape} {kernel}: by rule {usual or float('nan'):.4f} ms")
                for t in sorted(trials, key=lambda t: t.ms or float("inf")):
                    click.echo(f"    {tuple(t.config)!s:20} {t.ms:.4f}" if t.ms else f"    {tuple(t.config)} {t.why}")
                yield from trials


def checks(
    cases: Sequence[Case],
    shapes: Sequence[Shape] | None,
    dtypes: Sequence[torch.dtype],
    seeds: int,
    large: bool,
    clock: Clock,
) -> Iterator[Result]:
    for case in cases:
        if large:
            for shape in (MANY_HEADS, MANY_ELEMENTS):
                if clock.left():
                    yield show(check_large(case, shape))
        for shape in shapes or case.shapes:
            for dtype in dtypes:
                if not clock.left():
                    return
                for result in check_seeds(case, shape, dtype, seeds):
                    yield show(result)


def show(r: Result) -> Result:
    verdict = "pass" if r.passed else "FAIL"
    error = f"{r.worst} {r.error:.1e} (<= {r.tolerance:.0e})"
    click.echo(f"{verdict} {r.case:32} {r.shape!s:20} {r.dtype:9} {r.check:16} {r.seeds:3} seeds  {error}")
    return r


def attempt(measure: Callable[[], float]) -> tuple[float | None, str]:
    """What it measured, or why there is no measurement: peers refuse ops, and a config can ask for too much memory."""
    try:
        return measure(), ""
    except Exception as error:
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80] if str(error) else ''}"


def compile_all(jobs: Sequence[Job]) -> None:
    """Compile every kernel that the jobs run, on all cores, into Triton's cache on disk: here one takes seconds."""
    workers = min(_COMPILERS, os.cpu_count() or 1, len(jobs))
    start = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        refused = [why for why in pool.map(compile_one, jobs) if why]
    click.echo(f"compiled {len(jobs)} cases in {time.monotonic() - start:.0f} s; {len(refused)} refused")
    for why in refused:
        click.echo(f"    {why}")


def compile_one(job: Job) -> str:
    name, shape, dtype, kernel, config = job
    # Two sequences: kernels are specialised on lengths and strides, not on the batch.
    small = shape._replace(B=2)
    (case,) = (c for c in select(name) if c.name == name)
    inputs = case.inputs(small, Draw("cuda", dtype, 0))

    def run() -> float:
        run_op(case.ours, inputs, 0)
        return 0.0

    if kernel is None or config is None:
        _, why = attempt(run)
    else:
        with forced(kernel, config):
            _, why = attempt(run)
    return f"{name} {shape} {dtype} {kernel} {config}: {why}" if why else ""


def parse_shape(text: str) -> Shape:
    """B256_T256_H1_D64 -> Shape. Raises ConfigError."""
    parts = text.split("_")
    if [p[:1] for p in parts] != list("BTHD") or not all(p[1:].isdigit() and int(p[1:]) > 0 for p in parts):
        raise ConfigError(f"shape {text!r} is not of the form B256_T256_H1_D64.")
    return Shape(*(int(p[1:]) for p in parts))


def parse_dtypes(text: str) -> tuple[torch.dtype, ...]:
    known = {str(d).removeprefix("torch."): d for d in DTYPES}
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise ConfigError(f"dtype {unknown[0]!r} cannot be checked; choose from {', '.join(known)}.")
    return tuple(known[name] for name in text.split(","))


def versions() -> dict[str, Any]:
    packages = {}
    for package in ("torch", "triton", "fla-core", "flash-linear-attention"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"gpu": torch.cuda.get_device_name(0), "python": platform.python_version(), **packages}


def write(path: Path, lines: Sequence[Any]) -> None:
    """One CSV line a tuple, under the names of its fields."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        if lines:
            writer.writerow(lines[0]._fields)
        writer.writerows([" ".join(map(str, v)) if isinstance(v, Config) else v for v in line] for line in lines)


if __name__ == "__main__":
    command()
