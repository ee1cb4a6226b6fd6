"""The `zoo` command. What is heavy is imported inside the sub-commands, so that --help answers at once."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo import __version__
from zoo.command import Group, debug_option
from zoo.errors import ConfigError, PluginError, RecordError, UnknownNameError, UnsupportedError, did_you_mean
from zoo.process import MOST_THREADS

if TYPE_CHECKING:
    from zoo.record import Record
    from zoo.registry import Registry
    from zoo.testing import Check


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, package_name="zoo-mixers", prog_name="zoo")
@debug_option
@click.pass_context
def main(ctx: click.Context) -> None:
    """How much can a sequence mixer recall, for how much recurrent state?"""
    # A console script does not have the current folder on its path: module:Class there must be found.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    show = warnings.showwarning

    def show_warning(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if category.__module__.startswith("zoo."):
            click.echo(f"zoo: warning: {message}", err=True)
        else:
            show(message, category, *args, **kwargs)

    warnings.showwarning = show_warning
    ctx.call_on_close(lambda: setattr(warnings, "showwarning", show))


plugin_option = click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="FILE|MODULE",
    help="A Python file or module that registers mixers or tasks. May be given several times.",
)
device_option = click.option("--device", help="cpu or cuda. Left out: cuda where torch sees a GPU.")


# --- running ---------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("grid", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[PATH.KEY=V1,V2 ...]")
@click.option("--run", "run_dir", type=click.Path(file_okay=False), help="The run folder; left out: runs/NAME.")
@plugin_option
@click.option("--executor", type=click.Choice(["auto", "ray", "inline"]), default="auto", show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Packs at once on Ray; left out: one a GPU or one a core.")
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), default=1, show_default=True, help="CPU threads of each pack."
)
@click.option(
    "--pack",
    type=click.IntRange(1),
    help="Trials that may train together, where learning rate, weight decay and seed alone tell them apart; left out: "
    "16 on a GPU, 1 on a CPU.",
)
@click.option("--shard", metavar="K/N", default="1/1", help="Run the K-th of N parts, in the run folder NAME-K-of-N.")
@click.option(
    "--known", multiple=True, metavar="RUN", help="Take records from there, such as `reference`, not run them again."
)
@device_option
@click.option("--dry-run", is_flag=True, help="Print the trials and what they cost; run nothing.")
@click.option("--retry-failed", is_flag=True, help="Run trials whose record is a failure again.")
@click.option("--no-plot", is_flag=True, help="Leave out the figure, the table and the page at the end.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.pass_context
def sweep(
    ctx: click.Context,
    grid: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    plugins: tuple[str, ...],
    executor: Any,
    workers: int | None,
    threads: int,
    pack: int | None,
    shard: str,
    known: tuple[str, ...],
    device: str | None,
    dry_run: bool,
    retry_failed: bool,
    no_plot: bool,
    quiet: bool,
) -> None:
    """Run every trial of GRID that has no record yet; then print the frontier and draw it.

    Overrides replace settings of the grid; commas make an axis: model.d_model=64,128. Ctrl-C, and the same command
    again, costs only what was in flight. The exit status is 1 when a trial has failed.
    """
    from zoo.config import Sweep
    from zoo.registry import load_plugins
    from zoo.sweep import parse_shard, plan_sweep, run_sweep
    from zoo.text import plan_text

    load_plugins(plugins)
    trials = Sweep.load(grid, list(overrides))
    part = parse_shard(shard)
    name = trials.name if part == (1, 1) else f"{trials.name}-{part[0]}-of-{part[1]}"
    run = Path(run_dir) if run_dir else Path("runs") / name
    if dry_run:
        click.echo(
            plan_text(plan_sweep(trials, run, known=known, retry_failed=retry_failed, every=True), [run, *known])
        )
        return
    summary = run_sweep(
        trials,
        run,
        executor=executor,
        device=device,
        workers=workers,
        threads=threads,
        pack=pack,
        shard=part,
        plugins=plugins,
        known=known,
        retry_failed=retry_failed,
        progress=not quiet,
    )
    try:
        if not no_plot and not summary.interrupted:
            write_results(run)
    finally:
        # Also where the figure could not be written, or Ctrl-C came while it was drawn.
        click.echo(str(summary), err=True)
    ctx.exit(summary.exit_code)


@main.command()
@click.argument("grid", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[PATH.KEY=VALUE ...]")
@plugin_option
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), default=1, show_default=True, help="CPU threads.")
@device_option
@click.pass_context
def trial(
    ctx: click.Context,
    grid: str,
    overrides: tuple[str, ...],
    plugins: tuple[str, ...],
    threads: int,
    device: str | None,
) -> None:
    """Run the one trial that GRID and the overrides leave, here, and print its record as JSON."""
    from zoo.config import Sweep
    from zoo.executors import Job, execute
    from zoo.registry import load_plugins
    from zoo.sweep import make_setting
    from zoo.text import epoch_text

    load_plugins(plugins)
    loaded = Sweep.load(grid, list(overrides))
    trials = loaded.trials
    if len(trials) != 1:
        some = "".join(f"\n  {loaded.labels[t.key]}" for t in trials[:5])
        raise ConfigError(f"{grid} gives {len(trials)} trials; add overrides until one is left. Its first ones:{some}")
    setting = make_setting(device, threads, plugins)
    (record,) = execute((Job.of(trials[0]),), setting, lambda _, epoch: click.echo(epoch_text(epoch), err=True))
    click.echo(record.model_dump_json(indent=1))
    ctx.exit(1 if record.status == "failed" else 0)


# --- looking at runs -------------------------------------------------------------------------------------------------

runs_argument = click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN [RUN ...]")
runs_argument_optional = click.argument("runs", nargs=-1, type=click.Path(), metavar="[RUN ...]")


@main.command()
@runs_argument
@click.option(
    "--overlay", metavar="FILE", help="Points to draw hollow: a CSV, a run, `reference`, or published results by name."
)
@click.option("-o", "--output", metavar="PATH", help="PATH.png, .svg and .pdf are written; left out: RUN/frontier.")
@click.option("--by-slice", is_flag=True, help="One panel a test slice instead of their mean.")
def plot(runs: tuple[str, ...], overlay: str | None, output: str | None, by_slice: bool) -> None:
    """Draw accuracy against measured state, with the Pareto frontier.

    A RUN is a run folder, or `reference`: the published grids as measured with zoo, which come with it.
    """
    from zoo.plot import draw

    records = _records(runs)
    base = Path(output) if output else _beside(runs[0], "frontier")
    if base.suffix in (".png", ".svg", ".pdf"):
        base = base.with_suffix("")
    for path in draw(records, base, overlay, by_slice):
        click.echo(path)


@main.command()
@runs_argument
@click.option("--frontier", is_flag=True, help="One row a model, over its seeds and learning rates.")
@click.option("--overlay", metavar="FILE", help="One row a model that the overlay has as well; see `zoo plot`.")
def table(runs: tuple[str, ...], frontier: bool, overlay: str | None) -> None:
    """Print the trials, the frontier, or a comparison with other points."""
    from zoo.text import comparison_text, frontier_text, trials_text

    records = _records(runs)
    if overlay is not None:
        click.echo(comparison_text(records, overlay))
    else:
        click.echo(frontier_text(records) if frontier else trials_text(records))


@main.command()
@runs_argument
@click.option("-o", "--output", required=True, metavar="FILE", help="A .csv or .parquet file.")
def export(runs: tuple[str, ...], output: str) -> None:
    """Write the table of trials, every setting a column, to a file."""
    from zoo.results import export

    export(_records(runs), output)
    click.echo(output)


@main.command()
@runs_argument
@click.option("-o", "--output", metavar="FILE", help="The page; left out: RUN/report.html.")
def report(runs: tuple[str, ...], output: str | None) -> None:
    """Write one self-contained HTML page."""
    from zoo.report import write_report

    records = _records(runs)
    path = Path(output) if output else _beside(runs[0], "report.html")
    write_report(records, path)
    click.echo(path)


@main.command()
@click.argument("run", type=click.Path())
@click.argument("key")
def inspect(run: str, key: str) -> None:
    """Print all that is behind one trial of RUN; the first digits of its KEY are enough."""
    from zoo.results import RunStore
    from zoo.text import record_text

    click.echo(record_text(RunStore(run).get(key)))


@main.command()
@click.argument("folder", type=click.Path())
@runs_argument_optional
def compact(folder: str, runs: tuple[str, ...]) -> None:
    """Move the records of a run FOLDER, and copies of those of any RUN, into one small file of FOLDER.

    Every command reads them there as before.
    """
    from zoo.results import RunStore, load_runs

    others = load_runs(runs)
    store = RunStore(folder, create=bool(others))
    count = store.compact(others)
    click.echo(f"{store.archive}: {count} records, {store.archive.stat().st_size:,} bytes")


def _records(runs: Sequence[str]) -> list[Record]:
    from zoo.results import load_runs

    records = load_runs(runs)
    if not records:
        raise RecordError(
            f"{', '.join(runs)}: no trial has left a record yet; `zoo sweep` writes one as each trial ends."
        )
    return records


def _beside(run: str, name: str) -> Path:
    """In the run's folder, or here if the run is the package's own."""
    from zoo.results import is_reference

    if is_reference(run):
        return Path("-".join([*Path(run).parts, name]))
    if not os.access(run, os.W_OK):
        raise RecordError(f"{run!r} cannot be written to; choose another place with -o.")
    return Path(run) / name


def write_results(run: Path) -> None:
    """Print the frontier of a run; leave its figure, table and page in the run folder."""
    from zoo.plot import draw
    from zoo.report import write_report
    from zoo.results import RunStore, export
    from zoo.text import frontier_text

    records = RunStore(run).load()
    export(records, run / "table.csv")
    if not any(record.status == "ok" for record in records):
        click.echo("zoo: no trial ended well, so there is no frontier to draw.", err=True)
        return
    click.echo(frontier_text(records))
    written = draw(records, run / "frontier")
    write_report(records, run / "report.html")
    click.echo(f"{written[0]} (also .svg, .pdf), {run / 'report.html'}, {run / 'table.csv'}", err=True)


# --- measuring -------------------------------------------------------------------------------------------------------

_BENCHMARKS = {
    "kernels": "Fused ops on a GPU: are they right, and how long do they take?",
    "solve": "How long does a trial take to .99 validation accuracy?",
    "train": "How long do packs of trials take, and where does the time go?",
}


class _Bench(Group):
    """Commands of zoo.bench, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_BENCHMARKS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _BENCHMARKS and cmd_name not in self.commands:
            try:
                command = importlib.import_module(f"zoo.bench.{cmd_name}").command
            except ModuleNotFoundError as error:
                raise UnsupportedError(
                    f"zoo bench {cmd_name} needs {error.name}, which is not installed; `pip install {error.name}`."
                ) from error
            debug_option(command)
            self.add_command(command)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_BENCHMARKS.items()))


@main.group(cls=_Bench)
def bench() -> None:
    """Time kernels and training beside what peers take."""


# --- mixers and tasks ------------------------------------------------------------------------------------------------


@main.command("list")
@click.argument("kind", type=click.Choice(["mixers", "tasks"]), required=False)
@click.option("-v", "--verbose", is_flag=True, help="Options with their defaults, too.")
@plugin_option
def list_names(kind: str | None, verbose: bool, plugins: tuple[str, ...]) -> None:
    """Name every mixer and task, built-in or plugin."""
    from zoo.mixers import mixers
    from zoo.registry import load_plugins
    from zoo.tasks import tasks
    from zoo.text import names_text

    broken = {}
    for plugin in plugins:
        try:
            load_plugins([plugin])
        except PluginError as error:
            broken[plugin] = str(error)
    registries: list[Registry[Any]] = [r for r in (mixers, tasks) if kind in (None, f"{r.kind}s")]
    for registry in registries:
        broken |= registry.check_installed()
        click.echo(names_text(registry, verbose, skip=broken))
    for name, why in broken.items():
        click.echo(f"broken plugin {name}: {why}", err=True)
    if broken:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("name", metavar="TASK")
@click.argument("options", nargs=-1, metavar="[FIELD=VALUE ...]")
@click.option("-n", "examples", type=click.IntRange(1), default=3, show_default=True, help="Examples.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="train", show_default=True)
@plugin_option
def show(name: str, options: tuple[str, ...], examples: int, seed: int, split: Any, plugins: tuple[str, ...]) -> None:
    """Print a few examples of a task."""
    from zoo.config import parse
    from zoo.registry import load_plugins
    from zoo.tasks import tasks
    from zoo.tasks.show import render

    load_plugins(plugins)
    task = parse(tasks.get(name), read_options(options), f"task {name}")
    click.echo(render(task, examples, seed, split))


@main.command()
@click.argument("targets", nargs=-1, metavar="[NAME | FILE.py:CLASS | MODULE:CLASS ...] [OPTION=VALUE ...]")
@click.option("--all", "every", is_flag=True, help="Every mixer and task there is.")
@plugin_option
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.pass_context
def check(ctx: click.Context, targets: tuple[str, ...], every: bool, plugins: tuple[str, ...], device: str) -> None:
    """Check that mixers and tasks keep their contract. The exit status is 1 when a check fails."""
    from zoo.mixers import mixers
    from zoo.registry import load_plugins
    from zoo.sweep import resolve_device
    from zoo.tasks import tasks
    from zoo.testing import render

    load_plugins(plugins)
    device = resolve_device(device)
    assignments = [target for target in targets if re.match(r"[\w.]+=", target)]
    options = read_options(assignments)
    names = [target for target in targets if target not in assignments]
    if every:
        names += [name for name in (*mixers, *tasks) if name not in names]
    if not names:
        raise ConfigError("nothing to check; give names, file.py:Class or module:Class, or --all.")
    failed = []
    for name in names:
        click.echo(name)
        try:
            findings = run_checks(name, options, device)
        except PluginError as error:
            if not every:
                raise
            click.echo(f"  FAIL  {error}")
            failed.append(name)
            continue
        click.echo(render(findings))
        failed += [] if all(finding.passed for finding in findings) else [name]
    if len(names) > 1:
        click.echo(
            f"{len(names) - len(failed)} of {len(names)} passed" + (f"; failed: {', '.join(failed)}" if failed else "")
        )
    ctx.exit(1 if failed else 0)


def run_checks(name: str, options: dict[str, Any], device: str) -> list[Check]:
    """The findings for a mixer or a task, whichever `name` is."""
    from zoo.mixers import mixers
    from zoo.tasks import tasks
    from zoo.testing import check_mixer, check_task

    if ":" not in name and name not in mixers and name not in tasks:
        known = [*mixers, *tasks]
        raise UnknownNameError(
            f"unknown mixer or task {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}. "
            "One of your own: FILE.py:Class or module:Class."
        )
    problems: dict[str, None] = {}
    registries: list[Registry[Any]] = [tasks, mixers]
    for registry in registries:
        try:
            registry.get(name)
        except UnknownNameError:
            continue
        except PluginError as error:
            problems[str(error)] = None
        else:
            return check_task(name, options) if registry is tasks else check_mixer(name, options, device=device)
    raise PluginError("\n".join(problems))


def read_options(assignments: Iterable[str]) -> dict[str, Any]:
    """`["a=1", "b=x"]` -> {"a": 1, "b": "x"}, values as in YAML."""
    from zoo.grid import apply_override

    options: dict[str, Any] = {}
    for assignment in assignments:
        apply_override(options, assignment)
    return options


if __name__ == "__main__":
    main()
