"""`zoo bench kernels`: the fused ops against their peers, plain torch and what the hardware allows. Needs a GPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
import torch

from zoo.bench.case import Case, Draw, Op, Shape, select
from zoo.bench.check import DTYPES, Result, check_large, check_seeds, raised
from zoo.bench.output import csv_lines, environment, save_environment
from zoo.bench.timing import Pass, copy_bandwidth, eager_ms, graph_ms, matmul_rate, number_of_sets
from zoo.bench.tuning import share_of_tuning
from zoo.errors import ConfigError, UnsupportedError
from zoo.kernels.launch import Config, forced
from zoo.sweep import make_setting
from zoo.testing.ops import run_op

_COMPILERS = 24
_PARTS = 8


class Job(NamedTuple):
    """A case to compile: ours, with a config to try for one of its kernels or by rule, or a part of a peer's tuning."""

    case: str
    shape: Shape
    dtype: torch.dtype
    kernel: str | None = None
    config: Config | None = None
    peer: str | None = None
    part: int = 0


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
    config: str
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
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench/kernels"),
    show_default=True,
    help="Folder for the CSV files.",
)
@click.option("--time/--no-time", "timed", default=True, help="Measure times.")
@click.option("--peers/--no-peers", default=True, help="Measure peers where they are installed.")
@click.option("--eager/--no-eager", default=True, help="Also measure calls from Python, without a graph.")
@click.option("--check", "seeds", is_flag=False, flag_value=20, default=0, help="Compare with fp64; seeds, or 20.")
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
        raise UnsupportedError(
            f"zoo bench kernels needs a CUDA GPU, and torch {torch.__version__} sees none. The same checks run without "
            "one in the tests; zoo bench train and zoo bench solve have --device cpu."
        )
    clock = Clock(budget_seconds)
    cases = select(ops)
    chosen = None if shapes is None else tuple(parse_shape(s) for s in shapes.split(","))
    checked = parse_dtypes(dtypes) if seeds else ()
    out.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for case in cases:
        if large:
            jobs += [Job(case.name, shape, torch.bfloat16) for shape in case.large]
        for shape in chosen or case.shapes:
            run = dict.fromkeys((torch.bfloat16, *checked) if timed or sweep_configs else checked)
            jobs += [Job(case.name, shape, dtype) for dtype in run]
            if timed and peers and not sweep_configs:
                jobs += [
                    Job(case.name, shape, torch.bfloat16, peer=p, part=i) for p in case.peers for i in range(_PARTS)
                ]
            if sweep_configs:
                tried = case.configs(shape).items()
                jobs += [Job(case.name, shape, torch.bfloat16, k, c) for k, configs in tried for c in configs]
    compile_all(jobs)
    rates = {"copy_bytes_per_s": copy_bandwidth(), "matmul_flops_per_s": matmul_rate()}
    click.echo(save_environment(out, environment(make_setting("cuda", torch.get_num_threads(), ())) | rates))
    failed = False
    if seeds or large:
        with csv_lines(out / "checks.csv") as add_check:
            for result in checks(cases, chosen, checked, seeds, large, clock):
                add_check(result)
                failed = failed or not result.passed
    if sweep_configs:
        with csv_lines(out / "sweep.csv") as add_trial:
            for trial in sweep(cases, chosen, clock):
                add_trial(trial)
    elif timed:
        with csv_lines(out / "kernels.csv") as add_timing:
            # Peers tune themselves for half a minute an op: what needs none of them comes first.
            for with_peers in (False, True) if peers else (False,):
                for timing in timings(cases, chosen, with_peers, eager, rates, clock):
                    add_timing(timing)
    if not clock.left():
        click.echo(f"The budget of {budget_seconds:g} s was spent; what is missing above was not run.")
    if failed:
        raise SystemExit(1)


def timings(
    cases: Sequence[Case],
    shapes: Sequence[Shape] | None,
    peers: bool,
    eager: bool,
    rates: dict[str, float],
    clock: Clock,
) -> Iterator[Timing]:
    """Every case and shape, forward and both; a table is printed as it grows. Ours, and plain torch or each peer."""
    click.echo(TITLE)
    for case in cases:
        others: Mapping[str, Callable[[], Op]] = case.peers
        if not peers:
            others = {} if case.torch is None else {"torch": lambda case=case: case.torch}  # type: ignore[misc]
        elif not others:
            continue
        contenders: dict[str, Callable[[], Op]] = {"zoo": lambda case=case: case.ours, **others}  # type: ignore[misc]
        for shape in shapes or case.shapes:
            lines: dict[tuple[str, str], list[Timing]] = {}
            for who, load in contenders.items():
                if not clock.left():
                    break
                for t in time_one(case, shape, who, load, eager, rates):
                    lines.setdefault((t.which, t.mode), []).append(t)
                    yield t
            for alike in lines.values():
                click.echo(table_line(alike))


TITLE = (
    f"{'case':32} {'shape':18} {'pass':6} {'mode':5} {'ours ms':>8} {'peer':>8} {'torch':>8} {'floor':>8} "
    f"{'peer/ours':>9} {'ours/floor':>10}  fastest peer"
)


def table_line(alike: Sequence[Timing]) -> str:
    """Ours, the fastest peer and plain torch, in one pass of one case."""
    by = {t.who: t for t in alike}
    ours, plain = by.get("zoo"), by.get("torch")
    others = sorted((t for t in alike if t.who not in ("zoo", "torch")), key=lambda t: t.ms or float("inf"))
    peer = others[0] if others else None
    t = alike[0]
    mine, theirs = ours and ours.ms, peer and peer.ms
    times = (mine, theirs, plain and plain.ms, t.floor_ms)
    failures = [f"{t.who}: {t.why}" for t in alike if t.why]
    return (
        f"{t.case:32} {t.shape!s:18} {t.which:6} {t.mode:5} {' '.join(_number(ms, 8, 4) for ms in times)} "
        f"{_number(theirs / mine if mine and theirs else None, 9, 2)} "
        f"{_number(mine / t.floor_ms if mine else None, 10, 1)}  {peer.who if peer and peer.ms else ''}"
        + "".join(f"\n    {failure}" for failure in failures)
    )


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def time_one(
    case: Case, shape: Shape, who: str, load: Callable[[], Op], eager: bool, rates: dict[str, float]
) -> Iterator[Timing]:
    try:
        op = load()
    except ImportError:
        return
    sets = [case.inputs(shape, Draw("cuda", torch.bfloat16, 0))]
    sets += [case.inputs(shape, Draw("cuda", torch.bfloat16, seed)) for seed in range(1, number_of_sets(sets[0]))]
    passes = {"fwd": case.forward(shape)} | ({} if case.both is None else {"fwdbwd": case.both(shape)})
    for which, cost in passes.items():
        floors = (
            1e3 * cost.bytes() / rates["copy_bytes_per_s"],
            1e3 * cost.flops / rates["matmul_flops_per_s"],
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
                work = Pass(case.ours, inputs, case.both is not None and not kernel.endswith("forward"))
                trials = []
                usual, _ = attempt(lambda work=work: graph_ms(work))  # type: ignore[misc]
                for config in configs:
                    if not clock.left():
                        return
                    with forced(kernel, config):
                        ms, why = attempt(lambda work=work: graph_ms(work))  # type: ignore[misc]
                    trials.append(Trial(case.name, shape, kernel, " ".join(map(str, config)), ms, why))
                    yield trials[-1]
                click.echo(f"{case.name} {shape} {kernel}: by rule {usual or float('nan'):.4f} ms")
                for t in sorted(trials, key=lambda t: t.ms or float("inf")):
                    click.echo(f"    {t.config:20} {f'{t.ms:.4f}' if t.ms else t.why}")


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
            for shape in case.large:
                if clock.left():
                    yield from results(check_large, case, shape, torch.bfloat16)
        for shape in shapes or case.shapes:
            for dtype in dtypes:
                if not clock.left():
                    return
                yield from results(check_seeds, case, shape, dtype, seeds)


def results(
    check: Callable[..., Iterator[Result]], case: Case, shape: Shape, dtype: torch.dtype, *seeds: int
) -> Iterator[Result]:
    """What a check of a case found; one that raises, as for want of memory, has failed, and the others go on."""
    try:
        for result in check(case, shape, dtype, *seeds):
            yield show(result)
    except Exception as error:
        why = first_line(error)
    else:
        return
    # Only now, since the error held the tensors of the check.
    torch.cuda.empty_cache()
    yield show(raised(case, shape, dtype, why))


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
        return None, first_line(error)


def first_line(error: Exception) -> str:
    """Its type and the first 80 characters of what it says first."""
    first, *_ = str(error).strip().split("\n")
    return f"{type(error).__name__}: {first[:80]}"


def compile_all(jobs: Sequence[Job]) -> None:
    """Compile every kernel that the jobs run, on all cores, into Triton's cache on disk: here one takes seconds."""
    if not jobs:
        return
    workers = min(_COMPILERS, os.cpu_count() or 1, len(jobs))
    start = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        refused = [why for why in pool.map(compile_one, jobs) if why]
    click.echo(f"compiled {len(jobs)} cases in {time.monotonic() - start:.0f} s; {len(refused)} refused")
    for why in refused:
        click.echo(f"    {why}")


def compile_one(job: Job) -> str:
    # What is compiled depends on whether there are many sequences, and on whether 16 divides their number.
    small = job.shape._replace(B=min(job.shape.B, 256 + job.shape.B % 16))
    (case,) = (c for c in select(job.case) if c.name == job.case)
    inputs = case.inputs(small, Draw("cuda", job.dtype, 0))

    def run() -> float:
        run_op(case.ours, inputs, 0)
        # Which keeps less, and so runs other kernels.
        with torch.no_grad():
            case.ours(**inputs)
        return 0.0

    def run_peer() -> float:
        Pass(case.peers[job.peer or ""](), [inputs], case.both is not None).run(0)
        return 0.0

    if job.peer is not None:
        with share_of_tuning(job.part, _PARTS):
            # What a peer refuses is said where it is timed.
            attempt(run_peer)
        return ""
    if job.kernel is None or job.config is None:
        _, why = attempt(run)
    else:
        with forced(job.kernel, job.config):
            _, why = attempt(run)
    return f"{job.case} {job.shape} {job.dtype} {job.kernel} {job.config}: {why}" if why else ""


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


if __name__ == "__main__":
    command()
