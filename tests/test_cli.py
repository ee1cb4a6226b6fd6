"""The `zoo` command: what it prints, where, and its exit status."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner, Result
from sweep_cases import PLUGIN, grid, plugin  # noqa: F401

import zoo
from zoo.cli import main
from zoo.errors import ConfigError

pytestmark = pytest.mark.usefixtures("plugin")
ROOT = str(Path(zoo.__file__).parent.parent)


def run(*arguments: object) -> Result:
    """The command in this process. An exception that is no exit fails the test."""
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def grid_file(tmp_path):
    return write(tmp_path, lr=[0.001, 0.01], d_model=[8, 16])


def write(folder: Path, **settings) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(grid(**settings)))
    return file


def sweep(file: Path, folder: Path, *arguments: object) -> Result:
    return run("sweep", file, "--run", folder, "--plugin", PLUGIN, "--executor", "inline", *arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and what the sweep printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", sweep(write(folder, lr=[0.001, 0.01], d_model=[8, 16]), folder / "run")


# --- sweep -----------------------------------------------------------------------------------------------------------


def test_a_sweep_prints_its_frontier_and_leaves_figure_table_and_page(finished):
    folder, result = finished
    assert result.exit_code == 0
    assert "first_token T=8 V=8" in result.stdout
    assert "on the Pareto frontier" in result.stdout
    assert "tiny: 4 ok in" in result.stderr
    assert "[4/4] running_mean d=8" in result.stderr
    for name in ("frontier.png", "frontier.svg", "frontier.pdf", "table.csv", "report.html"):
        assert (folder / name).stat().st_size > 200
    assert len(list((folder / "records").glob("*.json"))) == 4


def test_the_same_sweep_again_runs_nothing_and_a_wider_one_the_rest(grid_file, tmp_path):
    sweep(grid_file, tmp_path / "run", "--no-plot", "--quiet")
    again = sweep(grid_file, tmp_path / "run", "--no-plot")
    assert again.exit_code == 0
    assert "nothing to run" in again.stderr
    wider = sweep(grid_file, tmp_path / "run", "--no-plot", "optimizer.lr=0.001,0.01,0.1")
    assert "2 ok in" in wider.stderr
    assert "4 had a record before" in wider.stderr
    assert wider.stdout == ""
    assert not (tmp_path / "run" / "frontier.png").exists()


def test_the_run_folder_is_named_after_the_sweep(grid_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("sweep", grid_file, "--plugin", PLUGIN, "--executor", "inline", "--no-plot", "--quiet")
    assert len(list((tmp_path / "runs" / "tiny" / "records").glob("*.json"))) == 4


def test_a_dry_run_prints_trials_and_cost_and_runs_nothing(grid_file, tmp_path, finished):
    result = sweep(grid_file, tmp_path / "run", "--dry-run")
    assert result.exit_code == 0
    assert not (tmp_path / "run").exists()
    assert result.stdout.count("running_mean d=") == 4
    assert "4 trials: 0 have a record in" in result.stdout
    assert f"{4 * 2 * 64 * 8:.3g} training tokens" in result.stdout
    assert "one slot" not in result.stdout

    folder, _ = finished
    result = sweep(grid_file, folder, "--dry-run", "optimizer.lr=0.001,0.01,0.1")
    assert "6 trials: 4 have a record in" in result.stdout
    assert "on one slot, as finished trials of the same family took." in result.stdout
    result = sweep(grid_file, tmp_path / "run", "--dry-run", "--known", folder)
    assert f"4 trials: 4 have a record in {tmp_path / 'run'} or {folder}, 0 to run." in result.stdout


def test_a_failed_trial_makes_the_exit_status_1_until_it_is_retried(tmp_path):
    file = write(tmp_path, behaviour=["raise", "good"], cured=str(tmp_path / "cured"))
    result = sweep(file, tmp_path / "run")
    assert result.exit_code == 1
    assert "FAILED  RuntimeError: this mixer always raises" in result.stderr
    assert "--retry-failed" in result.stderr
    # What went well is drawn all the same.
    assert (tmp_path / "run" / "frontier.png").exists()
    assert sweep(file, tmp_path / "run", "--no-plot").exit_code == 1
    (tmp_path / "cured").touch()
    assert sweep(file, tmp_path / "run", "--no-plot", "--retry-failed").exit_code == 0


def test_a_sweep_without_any_good_trial_says_so(tmp_path):
    result = sweep(write(tmp_path, behaviour="diverge"), tmp_path / "run")
    assert result.exit_code == 0
    assert "diverged: the training loss became nan" in result.stderr
    assert "no trial ended well" in result.stderr
    assert (tmp_path / "run" / "table.csv").exists()


def test_ctrl_c_in_the_terminal(tmp_path):
    # Enough trials that they outlast a busy machine's delay between the first record and the signal.
    file = write(tmp_path, lr=[i / 1000 for i in range(1, 61)], seconds=0.25)
    command = [sys.executable, "-m", "zoo", "sweep", str(file), "--run", str(tmp_path / "run"), "--plugin", PLUGIN]
    process = subprocess.Popen(
        [*command, "--executor", "inline"], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT}
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("records/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "trials to go; the same command goes on from here" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("where", ["zoo.sweep.plan_sweep", "zoo.plot.draw"])
def test_ctrl_c_before_and_after_the_trials(grid_file, tmp_path, monkeypatch, where):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    result = sweep(grid_file, tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr.endswith("zoo: interrupted; no record is lost, and the same command goes on from here.\n")
    assert ("4 ok in" in result.stderr) is (where == "zoo.plot.draw")


def test_a_figure_that_cannot_be_written_hides_no_trial(grid_file, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zoo.plot.save", full)
    result = sweep(grid_file, tmp_path / "run")
    assert result.exit_code == 2
    assert "4 ok in" in result.stderr
    assert "zoo: No space left on device" in result.stderr


def test_trial_runs_exactly_one_and_prints_its_record(grid_file):
    result = run("trial", grid_file, "--plugin", PLUGIN)
    assert result.exit_code == 2
    assert "gives 4 trials; add overrides until one is left" in result.stderr
    result = run("trial", grid_file, "model.d_model=8", "optimizer.lr=0.01", "--plugin", PLUGIN)
    assert result.exit_code == 0
    assert "epoch 2" in result.stderr
    assert json.loads(result.stdout)["status"] == "ok"


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_is_a_message_on_stderr_and_exit_status_2(grid_file, tmp_path):
    result = sweep(grid_file, tmp_path / "run", "model.d_modle=8")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("zoo: ")
    assert "unknown key 'model.d_modle'. Did you mean 'd_model'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_written_is_a_message_and_exit_status_2(finished, grid_file, tmp_path):
    folder, _ = finished
    (tmp_path / "file").touch()
    for command in (
        ["plot", folder, "-o", tmp_path / "file" / "figure"],
        ["export", folder, "-o", tmp_path / "file" / "table.csv"],
        ["report", folder, "-o", tmp_path / "file" / "page.html"],
        ["sweep", grid_file, "--plugin", PLUGIN, "--run", tmp_path / "file" / "run"],
    ):
        result = run(*command)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"zoo: {tmp_path / 'file'}")
        assert "Not a directory" in result.stderr or "File exists" in result.stderr
        with pytest.raises(OSError, match=r"Not a directory|File exists"):
            run(*command, "--debug")


def test_a_folder_is_no_grid(grid_file):
    result = run("sweep", grid_file.parent)
    assert result.exit_code == 2
    assert "is a folder, not a YAML file" in result.stderr


def test_a_syntax_error_names_its_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nmodel: {d_model: [8\n")
    result = run("sweep", tmp_path / "bad.yaml")
    assert result.exit_code == 2
    assert "bad.yaml, line 2" in result.stderr


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback(where):
    arguments = ["--debug", "sweep", "none.yaml"] if where == "before" else ["sweep", "none.yaml", "--debug"]
    with pytest.raises(ConfigError, match=r"'none\.yaml' does not exist"):
        run(*arguments)


def test_an_unknown_command_suggests_the_nearest():
    result = run("swep")
    assert result.exit_code == 2
    assert "no command 'swep'. Did you mean 'sweep'?" in result.stderr


@pytest.mark.filterwarnings("default::zoo.results.RecordWarning")
def test_a_corrupt_record_is_a_warning(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "records", tmp_path / "records")
    spoilt = min((tmp_path / "records").iterdir())
    spoilt.write_text("{")
    result = run("table", tmp_path)
    assert result.exit_code == 0
    assert f"zoo: warning: record '{spoilt}' cannot be read" in result.stderr
    assert result.stdout.count(" ok ") == 3


# --- looking at runs -------------------------------------------------------------------------------------------------


def test_table(finished):
    folder, _ = finished
    trials = run("table", folder)
    assert trials.exit_code == 0
    assert len(trials.stdout.splitlines()) == 5
    frontier = run("table", folder, "--frontier")
    assert frontier.stdout.count("running_mean") == 2
    assert run("table", folder.parent / "rnu").exit_code == 2
    assert "does not exist" in run("table", folder.parent / "rnu").stderr


def test_a_run_without_records_says_so(tmp_path):
    (tmp_path / "records").mkdir()
    for command in (["table"], ["table", "--frontier"], ["table", "--overlay", "reference"], ["plot"], ["report"]):
        result = run(*command, tmp_path)
        assert result.exit_code == 2
        assert f"zoo: {tmp_path}: no trial has left a record yet" in result.stderr
    assert run("export", tmp_path, "-o", tmp_path / "table.csv").exit_code == 2
    assert not (tmp_path / "table.csv").exists()


def test_a_run_that_cannot_be_written_to_names_the_option(finished, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    for command in ("plot", "report"):
        result = run(command, finished[0])
        assert result.exit_code == 2
        assert "cannot be written to; choose another place with -o" in result.stderr


def test_export(finished, tmp_path):
    folder, _ = finished
    for suffix, read in ((".csv", pd.read_csv), (".parquet", pd.read_parquet)):
        assert run("export", folder, "-o", tmp_path / f"table{suffix}").exit_code == 0
        assert sorted(read(tmp_path / f"table{suffix}")["d_model"]) == [8, 8, 16, 16]
    bad = run("export", folder, "-o", tmp_path / "table.xls")
    assert bad.exit_code == 2
    assert ".csv or .parquet" in bad.stderr


def test_plot(finished, tmp_path):
    folder, _ = finished
    result = run("plot", folder, "-o", tmp_path / "figure.png")
    assert result.exit_code == 0
    written = [tmp_path / f"figure.{suffix}" for suffix in ("png", "svg", "pdf")]
    assert result.stdout.split() == [str(path) for path in written]
    assert all(path.stat().st_size > 1000 for path in written)
    plain = written[1].read_text()
    (tmp_path / "mine.csv").write_text("family,label,bytes,accuracy\nbased,d64,4096,0.5\n")
    assert run("plot", folder, folder, "--overlay", tmp_path / "mine.csv", "-o", tmp_path / "overlaid").exit_code == 0
    assert (tmp_path / "overlaid.svg").read_text() != plain
    other_data = run("plot", folder, "--overlay", "based_figure2")
    assert other_data.exit_code == 2
    assert "has nothing on this data, which is first_token" in other_data.stderr
    assert run("plot", folder, "--overlay", "no_such_paper").exit_code == 2


def test_a_compacted_run_is_a_run(finished, tmp_path, grid_file):
    folder, _ = finished
    result = run("compact", tmp_path / "small", folder)
    assert result.exit_code == 0
    assert "records.jsonl.xz: 4 records" in result.stdout
    assert run("table", tmp_path / "small").stdout == run("table", folder).stdout
    assert "nothing to run" in sweep(grid_file, tmp_path / "small", "--no-plot").stderr


def test_the_packages_own_run_is_drawn_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("plot", "reference/based_figure2").stdout.split()[0] == "reference-based_figure2-frontier.png"
    assert run("report", "reference").stdout.strip() == "reference-report.html"
    compared = run("table", "reference/based_figure2", "--overlay", "based_figure2").stdout
    assert re.search(r"sliding_window +d128 w257 +0\.797 .* 0\.797 +[+-]0\.000 +263,168 +263,680", compared)
    assert "median |difference|" in compared
    none = run("table", "reference/based_figure2", "--overlay", tmp_path / "other.csv")
    assert none.exit_code == 2


def test_plot_by_slice(finished, tmp_path):
    folder, _ = finished
    run("plot", folder, "--by-slice", "-o", tmp_path / "slices")
    assert "T=8 V=8" in (tmp_path / "slices.svg").read_text()


def test_report(finished, tmp_path):
    folder, _ = finished
    result = run("report", folder, "-o", tmp_path / "page.html")
    assert result.exit_code == 0
    assert (tmp_path / "page.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_inspect(finished):
    folder, _ = finished
    key = min(path.stem for path in (folder / "records").glob("*.json"))
    text = run("inspect", folder, key[:10]).stdout
    assert text.startswith(f"{key}  ok")
    for part in (
        "test        T=8 V=8",
        "state of one sequence after 8 tokens",
        "layer 0  running_mean  state",
        "through the state",
        "epoch 2",
        "mixer: running_mean",
        "task first_token: 1+",
        "torch: ",
    ):
        assert part in text
    missing = run("inspect", folder, "zzz")
    assert missing.exit_code == 2
    assert "zzz" in missing.stderr


def test_inspect_shows_why_a_trial_failed(tmp_path):
    sweep(write(tmp_path, behaviour="raise"), tmp_path / "run", "--no-plot", "--quiet")
    (path,) = (tmp_path / "run" / "records").glob("*.json")
    text = run("inspect", tmp_path / "run", path.stem[:6]).stdout
    assert "RuntimeError: this mixer always raises" in text
    assert 'raise RuntimeError("this mixer always raises")' in text


# --- mixers and tasks ------------------------------------------------------------------------------------------------


def test_list_names_everything_with_one_line_each():
    result = run("list")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "Multi-query associative recall" in lines["mqar"]
    assert "h_t = h_{t-1} + W x_t" in lines["running_mean"]
    assert "mqar" not in run("list", "mixers").stdout
    assert "attention" not in run("list", "tasks").stdout


def test_list_verbose_has_the_options_with_their_defaults():
    text = run("list", "tasks", "--verbose").stdout
    assert "num_pairs: int" in text
    assert "= 8192" in text


def test_list_reports_a_broken_plugin_at_the_end_and_goes_on(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_of_mine\n")
    result = run("list", "--plugin", tmp_path / "broken.py")
    assert result.exit_code == 1
    assert "mqar" in result.stdout
    assert f"broken plugin {tmp_path / 'broken.py'}" in result.stderr
    assert "no_such_module_of_mine" in result.stderr


def test_help_and_list_import_nothing_heavy():
    program = (
        "import sys; from zoo.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'pandas', 'ray', 'rich', 'yaml') if m in sys.modules])"
    )
    for arguments in (["--help"], ["list"]):
        command = [sys.executable, "-c", program, *arguments]
        output = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}, check=True
        )
        assert output.stdout.splitlines()[-1] == "[]"


def test_show(tmp_path):
    result = run("show", "mqar", "seq_len=16", "num_pairs=2", "vocab_size=16", "-n", 2)
    assert result.exit_code == 0
    assert "example 1" in result.stdout
    assert "example 2" not in result.stdout
    assert run("show", "mqar", "seq_len=16", "--split", "test").exit_code == 0
    bad = run("show", "mqar", "seq_len=15")
    assert bad.exit_code == 2
    assert "seq_len 15 is odd" in bad.stderr
    assert "Did you mean 'mqar'?" in run("show", "mqra").stderr


def test_check_passes_what_keeps_its_contract():
    result = run("check", "running_mean", "first_token", "--plugin", PLUGIN)
    assert result.exit_code == 0
    assert "2 of 2 passed" in result.stdout
    assert "FAIL" not in result.stdout


def test_check_fails_what_breaks_it():
    result = run("check", f"{PLUGIN}:RunningMean", "behaviour=raise")
    assert result.exit_code == 1
    assert "FAIL  output" in result.stdout
    assert "this mixer always raises" in result.stdout
    bad = run("check", "running_mean", "behavior=raise")
    assert bad.exit_code == 2
    assert "Did you mean 'behaviour'?" in bad.stderr


def test_check_needs_names_that_exist():
    assert "Did you mean 'based'?" in run("check", "baesd").stderr
    assert "nothing to check" in run("check").stderr
    assert "unknown device 'tpu'; use cpu or cuda" in run("check", "based", "--device", "tpu").stderr
    assert run("check", "no_such_module:Class").exit_code == 2


def test_check_of_a_class_that_a_file_lacks_suggests_its_mixers_and_its_tasks(tmp_path):
    (tmp_path / "mine.py").write_text("from zoo.tasks.mqar import MQAR as Recall\nfrom zoo.mixers.based import Based\n")
    for wrong, right in (("Recal", "Recall"), ("Basd", "Based")):
        result = run("check", f"{tmp_path / 'mine.py'}:{wrong}")
        assert result.exit_code == 2
        assert f"Did you mean {right!r}?" in result.stderr
        assert "subclass of zoo.Task" in result.stderr
        assert "subclass of zoo.Mixer" in result.stderr
