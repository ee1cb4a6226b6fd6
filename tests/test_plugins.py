"""Plugins: a file, an installed package, a class by its address; and what a broken or colliding one is told."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.config import Sweep
from zoo.errors import PluginError, UnknownNameError
from zoo.mixers import Mixer, mixers
from zoo.registry import Registry, load_file, load_plugins
from zoo.results import RunStore, load_runs
from zoo.sweep import plan_sweep, run_sweep
from zoo.tasks import tasks
from zoo.testing import check_mixer, check_task, render
from zoo.train import run_trial

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"

MIXER = """
from zoo import Mixer, register_mixer

@register_mixer("{name}")
class Theirs(Mixer):
    def forward(self, x):
        return x
"""


@pytest.fixture(autouse=True)
def _registries_as_they_were(monkeypatch):
    for registry in (mixers, tasks):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
        monkeypatch.setattr(registry, "_entry_points", None)
    before = set(sys.modules)
    yield
    # A file is imported once: what it registered would be missing from then on.
    for name in set(sys.modules) - before:
        if name.startswith("zoo_plugin_"):
            del sys.modules[name]


@pytest.fixture
def fresh():
    """A mixer registry of its own, with two built-ins, one of them broken."""
    return Registry("mixer", lambda: Mixer, "zoo.mixers", {"sound": "broken_mixers:Sound", "gone": "no.such:Thing"})


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a module and entry points look installed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package: str, entry_points: str, **modules: str) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[zoo.mixers]\n{entry_points}\n")
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)

    return install


def trial_of(mixer: dict, task: dict, **training: object):
    """A trial of one layer that ends in a second."""
    (trial,) = Sweep.from_dict(
        {
            "data": {"train": [{**task, "examples": 512}], "test": [{**task, "examples": 128}]},
            "model": {"d_model": 16, "layers": [mixer]},
            "optimizer": {"lr": 0.01},
            "training": {"epochs": 1, "batch_size": 64, **training},
        }
    ).trials
    return trial


# One file.


@pytest.mark.parametrize(
    ("mixer", "config"),
    [
        ("my_mixer.py:MinimalGRU", {}),
        ("my_mixer.py:MinimalGRU", {"expand": 2}),
        ("published_hyena.py:PublishedHyena", {}),
        ("published_block.py:PublishedGatedConv", {}),
        ("published_block.py:PublishedDeltaNet", {}),
        ("published_block.py:PublishedH3", {}),
    ],
)
def test_the_files_among_the_experiments_keep_the_contract(mixer, config):
    checks = check_mixer(f"{EXPERIMENTS}/{mixer}", config)
    assert all(c.passed for c in checks), render(checks)


def test_the_task_among_the_experiments_keeps_the_contract():
    checks = check_task(f"{EXPERIMENTS}/paused_sets.py:PausedSets")
    assert all(c.passed for c in checks), render(checks)


@pytest.mark.parametrize("run", sorted(path.name for path in (EXPERIMENTS / "results").iterdir()))
def test_the_results_among_the_experiments_are_of_the_files_beside_them(run):
    load_file(EXPERIMENTS / f"{run}.py")
    registries = {"mixer": mixers, "task": tasks}
    of_plugins = {
        (name, version)
        for record in load_runs([str(EXPERIMENTS / "results" / run)])
        for name, version in record.versions.items()
        if "+" in version
    }
    assert of_plugins
    for name, version in of_plugins:
        kind, plugin = name.split()
        assert registries[kind].version(plugin) == version


def test_a_file_registers_its_mixer_and_a_trial_runs_with_it(tmp_path):
    file = shutil.copy(EXPERIMENTS / "my_mixer.py", tmp_path)
    assert "my_gru" not in mixers
    module = load_file(file)
    assert load_file(file) is module
    assert mixers.get("my_gru") is module.MinimalGRU
    assert "my_gru" in mixers.names()
    outcome = run_trial(trial_of({"mixer": "my_gru", "expand": 3}, {"task": "mqar", "seq_len": 32, "vocab_size": 64}))
    assert outcome.status == "ok"
    assert outcome.state[0].elements == 3 * 16
    assert outcome.agreement.same_answers == 1.0


def test_an_edit_of_a_plugin_is_another_version(tmp_path):
    versions = []
    for i, source in enumerate((MIXER, MIXER, MIXER + "# edited\n")):
        file = tmp_path / f"plugin{i}.py"
        file.write_text(source.format(name=f"mine{i}"))
        versions.append(mixers.version(f"{file}:Theirs"))
        assert mixers.version(f"mine{i}") == versions[-1]
    assert all(v.startswith("1+") and len(v) == 14 for v in versions)
    assert len(set(versions)) == 3
    assert "+" not in mixers.version("attention")


def test_an_edit_of_a_file_that_a_plugin_imports_is_another_version(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "theirs_deep": "import math\n\nWIDTH = math.isqrt(4)\n\ndef width():\n    return WIDTH\n",
        "theirs_beside": "import theirs_deep as deep\n\nclass Base:\n    width = deep.width()\n",
        "theirs_plugin": "from theirs_beside import Base\nfrom zoo.mixers.based import Based\n\n"
        "class Theirs(Base, Based):\n    pass\n",
        "unrelated": "",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    before = mixers.version(f"{tmp_path / 'theirs_plugin.py'}:Theirs")
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(f"{text}# edited\n")
        changed = mixers.version(f"{tmp_path / 'theirs_plugin.py'}:Theirs") != before
        assert changed is (name != "unrelated"), name
        (tmp_path / f"{name}.py").write_text(text)
    assert mixers.version(f"{tmp_path / 'theirs_plugin.py'}:Theirs") == before


def test_a_class_from_a_file_can_be_pickled(tmp_path):
    (tmp_path / "plugin.py").write_text(MIXER.format(name="pickled"))
    cls = mixers.get(f"{tmp_path / 'plugin.py'}:Theirs")
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_a_file_registers_a_task(tmp_path):
    source = (EXPERIMENTS / "plugin_example/zoo_plugin_example/induction.py").read_text()
    source = source.replace("import Batch, Task", "import Batch, Task, register_task")
    (tmp_path / "my_task.py").write_text(source.replace("class Ind", '@register_task("my_task")\nclass Ind'))
    load_file(tmp_path / "my_task.py")
    batch = tasks.get("my_task")(seq_len=9).sample(4, seed=0, split="train")
    assert batch.tokens.shape == (4, 9)


def test_a_task_whose_option_is_a_list_is_planned_and_swept(tmp_path):
    @tasks.register("listed")
    class Listed(tasks.get("mqar")):
        sizes: list[int] = [1, 2]

    task = {"task": "listed", "seq_len": 16, "num_pairs": 2, "vocab_size": 32}
    data = {"train": [{**task, "examples": 64}], "test": [{**task, "examples": 16}]}
    model, training = {"d_model": 8, "layers": ["attention"]}, {"epochs": 1}
    grid = Sweep.from_dict({"data": data, "model": model, "optimizer": {"lr": 0.01}, "training": training})
    (planned,) = plan_sweep(grid, tmp_path)
    assert planned.cost.tokens == 64 * 16
    for again in (False, True):
        summary = run_sweep(grid, tmp_path, executor="inline", device="cpu", progress=False)
        assert [record.status for record in (summary.earlier if again else summary.done)] == ["ok"]


# A class by its address.


def test_module_and_class(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "their_package.py").write_text(MIXER.format(name="theirs"))
    cls = mixers.get("their_package:Theirs")
    assert cls.__module__ == "their_package"
    assert mixers.get("theirs") is cls
    assert mixers.version("their_package:Theirs").startswith("1+")


def test_a_trial_of_a_class_by_its_address():
    mixer = f"{EXPERIMENTS / 'my_mixer.py'}:MinimalGRU"
    outcome = run_trial(trial_of({"mixer": mixer}, {"task": "mqar", "seq_len": 32, "vocab_size": 64}))
    assert outcome.state[0].layers[0].mixer == mixer
    assert outcome.state[0].elements == 16


# An installed package.


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where the example package is installed: a folder for PYTHONPATH."""
    here = tmp_path_factory.mktemp("package")
    source, target = here / "source", here / "site"
    shutil.copytree(EXPERIMENTS / "plugin_example", source)  # so that building leaves nothing in the repository
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "-q"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    run = subprocess.run(pip, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return target


def python(*arguments: str, path: list[Path]) -> str:
    """What a new Python process prints. It fails the test when the process fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_an_installed_package_is_found_and_a_trial_runs_with_it(installed):
    code = """
import json
from zoo.mixers import mixers
from zoo.tasks import tasks
from zoo.testing import check_mixer
from zoo.train import run_trial
from test_plugins import trial_of

assert mixers.check_installed() == tasks.check_installed() == {}
outcome = run_trial(trial_of({"mixer": "leaky_average"}, {"task": "induction", "seq_len": 8, "vocab_size": 8}))
print(json.dumps({
    "names": [n for n in [*mixers, *tasks] if n in ("leaky_average", "induction")],
    "builtin": mixers.is_builtin("leaky_average"),
    "file": __import__("sys").modules[mixers.get("leaky_average").__module__].__file__,
    "version": mixers.version("leaky_average"),
    "failed": [c.detail for c in check_mixer("leaky_average") if not c.passed],
    "status": outcome.status,
    "state": outcome.state[0].elements,
}))
"""
    found = json.loads(python("-c", code, path=[installed, Path(__file__).parent]))
    assert found["names"] == ["leaky_average", "induction"]
    assert not found["builtin"]
    assert Path(found["file"]).is_relative_to(installed)
    assert found["version"].startswith("1+")
    assert found["failed"] == []
    assert (found["status"], found["state"]) == ("ok", 16)


def test_the_example_packages_own_tests_pass(installed):
    tests = str(installed.parent / "source" / "tests")
    report = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests, tests, path=[installed])
    assert " passed" in report
    assert "failed" not in report


def test_the_example_task_answers_what_followed_the_trigger(installed):
    code = """
import numpy as np
from zoo.tasks import tasks
batch = tasks.get("induction")(seq_len=12, vocab_size=5).sample(2000, seed=0, split="train")
assert (batch.tokens[:, -1] == 0).all() and ((batch.tokens == 0).sum(1) == 2).all()
first = (batch.tokens == 0).argmax(1)
assert (batch.answers[:, 0] == batch.tokens[np.arange(2000), first + 1]).all()
assert set(first) == set(range(10)) and set(batch.answers[:, 0]) == {1, 2, 3, 4}
print("checked")
"""
    assert python("-c", code, path=[installed]) == "checked\n"


# What goes wrong.


def test_a_broken_package_is_reported_by_name_and_the_others_go_on(fresh, install):
    install(
        "theirs",
        "fine = fine_mixer:Theirs\nbroken = broken_mixer:Theirs\nabsent = absent_mixer:Theirs\n"
        "exits = exiting_mixer:Theirs\nrenamed = fine_mixer:Their\nnumber = fine_mixer:NUMBER\n"
        "sound = fine_mixer:Theirs",
        fine_mixer=MIXER.format(name="another_name") + "NUMBER = 3\n",
        broken_mixer="import torch\n\ntorch.no_such_function()\n",
        exiting_mixer="raise SystemExit(2)\n",
    )
    errors = fresh.check_installed()
    assert list(errors) == ["broken", "absent", "exits", "renamed", "number", "sound"]
    start = "mixer 'broken' cannot be loaded from entry point 'broken' of theirs (broken_mixer:Theirs): "
    assert errors["broken"].startswith(start + "AttributeError: module 'torch' has no attribute 'no_such_function'")
    assert errors["broken"].endswith("(broken_mixer.py, line 3)")
    assert errors["absent"].endswith("(absent_mixer:Theirs): ModuleNotFoundError: No module named 'absent_mixer'")
    assert errors["exits"].endswith("SystemExit: 2 (exiting_mixer.py, line 1)")
    assert "'Their' is missing; expected a subclass of zoo.Mixer. Did you mean 'Theirs'?" in errors["renamed"]
    assert "'NUMBER' is 3; expected a subclass of zoo.Mixer." in errors["number"]
    assert errors["sound"] == (
        "mixer 'sound' from entry point 'sound' of theirs (fine_mixer:Theirs) collides with the built-in "
        "broken_mixers:Sound, which is used; rename the entry point."
    )
    assert fresh.names() == ["absent", "broken", "exits", "fine", "gone", "number", "renamed", "sound"]
    assert fresh.get("fine").__name__ == "Theirs"
    assert fresh.get("sound").__name__ == "Sound"
    with pytest.raises(PluginError, match=r"mixer 'broken' cannot be loaded"):
        fresh.get("broken")
    with pytest.raises(PluginError, match=r"mixer 'gone' cannot be loaded from 'no.such:Thing': ModuleNotFoundError"):
        fresh.get("gone")


def test_two_packages_with_one_name_are_both_named(fresh, install):
    source = MIXER.format(name="another_name")
    install("first", "twin = first_mixer:Theirs\nonly = first_mixer:Theirs", first_mixer=source)
    install("second", "twin = second_mixer:Theirs", second_mixer=source)
    with pytest.raises(PluginError) as error:
        fresh.get("twin")
    for claim in (
        "entry point 'twin' of first (first_mixer:Theirs)",
        "entry point 'twin' of second (second_mixer:Theirs)",
    ):
        assert claim in str(error.value)
    assert list(fresh.check_installed()) == ["twin"]
    assert fresh.get("only").__module__ == "first_mixer"


def test_a_plugin_file_may_be_imported_by_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shared_base.py").write_text(MIXER.format(name="shared"))
    (tmp_path / "on_top.py").write_text(
        "from shared_base import Theirs\nfrom zoo import register_mixer\n\n"
        "@register_mixer('derived')\nclass Derived(Theirs):\n    pass\n"
    )
    load_plugins([str(tmp_path / "shared_base.py"), str(tmp_path / "on_top.py")])
    assert issubclass(mixers.get("derived"), mixers.get("shared"))
    (tmp_path / "another.py").write_text(MIXER.format(name="shared"))
    with pytest.raises(PluginError, match="'shared' is taken by shared_base:Theirs"):
        load_plugins([str(tmp_path / "another.py")])


def test_a_name_is_registered_once(fresh, install):
    install("theirs", "installed = their_mixer:Theirs", their_mixer=MIXER.format(name="another_name"))

    class Mine(Mixer):
        pass

    class Other(Mixer):
        pass

    fresh.register("mine")(Mine)
    fresh.register("mine")(Mine)  # a file imported twice
    with pytest.raises(PluginError, match=r"mixer name 'mine' is taken by test_plugins:.*Mine; choose another name"):
        fresh.register("mine")(Other)
    with pytest.raises(PluginError, match=r"'sound' is taken by the built-in broken_mixers:Sound; choose another name"):
        fresh.register("sound")(Mine)
    with pytest.raises(PluginError, match=r"'installed' is taken by the installed entry point 'installed' of theirs"):
        fresh.register("installed")(Mine)
    with pytest.raises(PluginError, match=r"must not be empty or hold ':'"):
        fresh.register("a:b")(Mine)
    assert fresh.get("mine") is Mine
    assert fresh.get("installed").__module__ == "their_mixer"


def test_what_is_no_mixer_is_refused(fresh):
    for wrong in (int, lambda x: x):
        with pytest.raises(PluginError, match=r"mixer 'wrong': .* is not a subclass of zoo.Mixer; derive it from that"):
            fresh.register("wrong")(wrong)
    with pytest.raises(PluginError, match=r"'MinimalGRU' is <class 'zoo_plugin_.*>; expected a subclass of zoo.Task"):
        tasks.get(f"{EXPERIMENTS / 'my_mixer.py'}:MinimalGRU")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "import nowhere_to_be_found\n",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found' (plugin.py, line 1)",
        ),
        ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax (plugin.py, line 2)"),
        ("import sys\nsys.exit('no GPU')\n", "SystemExit: no GPU (plugin.py, line 2)"),
        (
            MIXER.format(name="attention"),
            "mixer name 'attention' is taken by the built-in zoo.mixers.attention:Attention",
        ),
    ],
    ids=["import", "syntax", "exit", "collision"],
)
def test_a_file_that_fails_says_why(tmp_path, source, says):
    file = tmp_path / "plugin.py"
    file.write_text(source)
    for load in (lambda: load_file(file), lambda: mixers.get(f"{file}:Theirs")):
        with pytest.raises(PluginError) as error:
            load()
        assert str(file) in str(error.value)
        assert says in str(error.value)
    file.write_text(MIXER.format(name=f"repaired_{len(says)}"))
    assert load_file(file).Theirs in mixers._registered.values()


def test_files_that_are_none(tmp_path):
    with pytest.raises(PluginError, match=r"plugin file 'no/such.py' does not exist; give the path of a Python file"):
        load_file("no/such.py")
    with pytest.raises(PluginError, match=r"plugin file 'no/such.py' does not exist"):
        mixers.get("no/such.py:Theirs")
    (tmp_path / "plugin.txt").write_text("")
    with pytest.raises(PluginError, match=r"is not a Python file; its name must end in .py"):
        load_file(tmp_path / "plugin.txt")


def test_unknown_names_get_the_nearest(fresh):
    with pytest.raises(UnknownNameError, match=r"unknown mixer 'sond'\. Did you mean 'sound'\? Known: gone, sound\. "):
        fresh.get("sond")
    with pytest.raises(UnknownNameError, match=r"unknown mixer 'zzzzzz'\. Known: gone, sound\. A mixer of your own"):
        fresh.get("zzzzzz")
    with pytest.raises(UnknownNameError, match=r"mixer 'my_mixer.py' is a file; name the class in it too"):
        fresh.get("my_mixer.py")
    with pytest.raises(UnknownNameError, match=r"a mixer name must be text, not 3"):
        fresh.get(3)
    with pytest.raises(UnknownNameError, match=r"unknown task 'mqra'\. Did you mean 'mqar'\?"):
        tasks.get("mqra")


# What the documentation shows.


def test_the_readme_names_every_built_in():
    (named,) = re.findall(r"^Mixers: (.*?)\. Tasks: (.*?)\. ", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    for text, registry in zip(named, (mixers, tasks), strict=True):
        assert re.findall(r"`(\w+)`", text) == sorted(registry._builtins)


def test_the_documented_task_keeps_the_contract(tmp_path):
    (source,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/add_a_task.md").read_text(), flags=re.M | re.S)
    (tmp_path / "documented.py").write_text(source)
    checks = check_task(f"{tmp_path / 'documented.py'}:LookBack")
    assert all(c.passed for c in checks), render(checks)


@pytest.mark.parametrize("page", ["README.md", "docs/sweeps.md"])
def test_the_documented_grid_loads(tmp_path, page):
    (source,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)
    (tmp_path / "grid.yaml").write_text(source)
    assert len(Sweep.load(tmp_path / "grid.yaml").trials) == {"README.md": 30, "docs/sweeps.md": 72}[page]


def test_the_documented_trials_of_the_reference_are_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    keys = [key for page in pages for key in re.findall(r"zoo inspect reference\S* ([0-9a-f]{4,})", page)]
    assert keys
    assert all(RunStore("reference").get(key).status == "ok" for key in keys)


@pytest.mark.parametrize("page", ["README.md", "docs/add_a_mixer.md"])
def test_the_documented_mixer_keeps_the_contract(tmp_path, page):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)
    (source,) = [block for block in blocks if "@register_mixer" in block]
    (tmp_path / "documented.py").write_text(source)
    name = re.search(r"^class (\w+)\(Mixer\)", source, flags=re.M)[1]
    checks = check_mixer(f"{tmp_path / 'documented.py'}:{name}")
    assert all(c.passed for c in checks), render(checks)
