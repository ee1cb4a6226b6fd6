"""The task checker: each check fails on a task broken in just that way, and sound tasks pass all."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import broken_tasks as broken
import numpy as np
import pytest
import torch

from zoo.errors import ConfigError, PluginError, UnknownNameError
from zoo.tasks import tasks
from zoo.tasks.mqar import MQAR
from zoo.tasks.set_disjointness import SetDisjointness
from zoo.testing import TaskConformance, check_task
from zoo.testing.report import run_check
from zoo.testing.task import CHECKS

SHAPES = "shapes and types"
TOKENS = "tokens in vocabulary"
POSITIONS = "positions in sequence"
ASKS = "every example asks"
CONTEXT = "context comes first"
MEMORY = "answers need memory"
AGAIN = "same bytes again"
STRETCH = "any stretch is the same"
PROCESS = "same bytes in another process"
SPLITS = "splits and seeds differ"
GLOBAL = "global generators are left alone"
CONFIG = "config round trip"
PICKLE = "pickling"
NAMES = "slice names differ"
LIMIT = "information limit"
SHOWN = "shown as text"

# Each broken task, the checks that must fail (and no other), and what the first of them must say.
BROKEN = [
    (broken.NarrowTokens, {SHAPES}, "tokens of 1 examples are (1, 12) int32; a batch holds int64 arrays"),
    (broken.OneTokenMore, {SHAPES}, "examples have 13 tokens, but the task's length is 12"),
    (broken.TokenTooLarge, {TOKENS}, "the token 500 is not in [0, 500), nor are 0 others"),
    (broken.NegativeAnswer, {TOKENS}, "the answer -1 is not in [0, 500), nor are 0 others"),
    (broken.PositionTooFar, {POSITIONS, MEMORY}, "the position 12 is not in [0, 12), nor are 0 others"),
    (broken.PadsElsewhere, {POSITIONS}, "a position whose answer is -100 is not 0"),
    (
        broken.AsksTwice,
        {POSITIONS},
        "two answers are asked at one position in 2048 of 2048 examples, first in number 0",
    ),
    (broken.SometimesSilent, {ASKS}, "2 of 2048 examples ask nothing, first number 1001"),
    (broken.AsksInContext, {CONTEXT}, "an answer is asked at position 11, inside the context of 12 tokens"),
    (broken.ContextTooLong, {CONTEXT}, "context_len 13 is not an integer in [0, 12]"),
    (
        broken.ShowsTheAnswer,
        {MEMORY},
        "a table from the token at the asked position to the answer, made of 1024 examples, is right in all",
    ),
    (
        broken.FreshEntropy,
        {AGAIN, STRETCH, PROCESS, GLOBAL, CONFIG, PICKLE},
        "train sampled again: tokens differ in 20 of 20 examples, first in number 0",
    ),
    (broken.CountsCalls, {AGAIN, STRETCH, PROCESS, GLOBAL, CONFIG, PICKLE}, "train sampled again: tokens differ"),
    (broken.DependsOnN, {STRETCH}, "train sample(4, start=3) against sample(10)[3:7]: tokens differ in 4 of 4"),
    (broken.DependsOnHash, {PROCESS}, "another process gives other examples"),
    (broken.IgnoresSplit, {SPLITS}, "1024 of 1024 validation examples of seed 0 are also train examples of seed 0"),
    (broken.IgnoresSeed, {SPLITS}, "1024 of 1024 train examples of seed 1 are also train examples of seed 0"),
    (broken.TestIsLaterTraining, {SPLITS}, "924 of 1024 validation examples of seed 0 are also train examples of seed"),
    (broken.DrawsFromNumpy, {GLOBAL}, "sampling draws from the global generator of numpy.random; draw from `rng` only"),
    (broken.DrawsFromTorch, {GLOBAL}, "sampling draws from the global generator of torch"),
    (broken.DrawsFromRandom, {GLOBAL}, "sampling draws from the global generator of random"),
    (broken.ReadsNumpy, {GLOBAL, PROCESS}, "another process gives other examples"),
    (broken.TakesAnyKey, {CONFIG}, "the unknown key 'no_such_option' is taken in silence"),
    (broken.Changeable, {CONFIG}, "the field 'seq_len' can be set; keep frozen=True of Task"),
    (broken.HoldsALambda, {PROCESS, PICKLE}, "crashed: "),
    (broken.NamesTooLittle, {NAMES}, "slice_name 'T=12' stands for the settings given, and with vocab_size=501 too"),
    (broken.NegativeLimit, {LIMIT}, "information_limit_bits(0.0) is -1.0; it is None for every accuracy, or a finite"),
    (broken.FallingLimit, {LIMIT}, "information_limit_bits falls from 5 at accuracy 0.0 to 4.8 at 0.05"),
    (broken.LimitWithHoles, {LIMIT}, "information_limit_bits(0.5) is None; it is None for every accuracy, or a finite"),
    (broken.ShowsNothing, {SHOWN}, "describe gives ' '; it must give text"),
    (broken.ShowsOnlyTheFirst, {SHOWN}, "describe gives the same text for two different examples"),
    (
        broken.FractionalTokens,
        set(CHECKS) - {NAMES, LIMIT},
        "crashed: TypeError: Cannot cast array data from dtype('float64') to dtype('int64')",
    ),
    (
        broken.CannotSample,
        set(CHECKS) - {NAMES, LIMIT},
        "crashed: ZeroDivisionError: division by zero (at broken_tasks.py:",
    ),
]
# These are wrong in so many ways that only the first finding is of interest.
BROKEN_THROUGHOUT = [
    (broken.TorchAnswers(), SHAPES, "answers of 1 examples are a Tensor; a batch holds int64 arrays"),
    (broken.FewerPositions(), SHAPES, "positions are (1, 1), answers (1, 2); each answer has a position"),
    (broken.ForgetsASetting(seq_len=12), CONFIG, "comes back from JSON as ForgetsASetting(seq_len=14, vocab_size=500)"),
    (broken.PicklesItsDefaults(seq_len=8), PICKLE, "comes back from pickle as PicklesItsDefaults(seq_len=12, vocab"),
]


@pytest.mark.parametrize(
    "task",
    [
        broken.Sound(),
        # So few examples that splits must share some.
        broken.Sound(seq_len=4, vocab_size=3),
        MQAR(seq_len=4, num_pairs=1, vocab_size=4),
        MQAR(seq_len=256, num_pairs=64, random_filler=True),
        SetDisjointness(size_a=32, size_b=4, first="b", num_passes=2),
    ],
    ids=lambda t: t.slice_name,
)
def test_sound_tasks_pass(task):
    checks = check_task(task)
    assert [c.name for c in checks] == list(CHECKS)
    assert [c for c in checks if not c.passed] == []
    assert all(c.detail for c in checks)


@pytest.mark.parametrize("name", ["mqar", "set_disjointness"])
def test_builtin_tasks_pass_by_name(name):
    assert [c for c in check_task(name) if not c.passed] == []


@pytest.mark.parametrize(("task", "expected", "says"), BROKEN, ids=[cls.__name__ for cls, *_ in BROKEN])
def test_each_check_fails_on_the_task_broken_in_just_that_way(task, expected, says):
    # Another interpreter is only started for those that should fail there: it takes most of the time.
    names = [name for name in CHECKS if name != PROCESS or PROCESS in expected]
    failed = [found for found in (check_alone(task(), name) for name in names) if not found.passed]
    assert {found.name for found in failed} == expected
    assert says in failed[0].detail


def check_alone(task, name):
    return run_check(name, lambda: CHECKS[name](task))


@pytest.mark.parametrize(("task", "check", "says"), BROKEN_THROUGHOUT, ids=lambda value: type(value).__name__)
def test_tasks_broken_throughout(task, check, says):
    found = check_alone(task, check)
    assert not found.passed
    assert says in found.detail


def test_every_check_has_a_task_that_fails_it():
    covered = set().union(*(expected for cls, expected, _ in BROKEN if len(expected) < 8))
    assert covered | {check for _, check, _ in BROKEN_THROUGHOUT} == set(CHECKS)


def test_global_generators_are_as_before_after_checking():
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    for task in (broken.Sound(), broken.DrawsFromNumpy()):
        check_alone(task, GLOBAL)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_what_cannot_be_checked_raises():
    with pytest.raises(PluginError, match=r"<class 'int'> is not a subclass of zoo.Task"):
        check_task(int)
    with pytest.raises(UnknownNameError, match=r"unknown task 'mqra'. Did you mean 'mqar'"):
        check_task("mqra")
    with pytest.raises(ConfigError, match=r"unknown key 'sequence_len'. Did you mean 'seq_len'"):
        check_task("mqar", {"sequence_len": 64})
    with pytest.raises(ConfigError, match="seq_len 65 is odd"):
        check_task(MQAR, {"seq_len": 65})


class TestInheritance(TaskConformance):
    """What a plugin's author writes."""

    @pytest.fixture
    def task(self):
        return broken.Sound(vocab_size=100)


def test_the_pytest_class_has_every_check():
    tests = {name.removeprefix("test_").replace("_", " ") for name in dir(TaskConformance) if name.startswith("test_")}
    assert tests == set(CHECKS)


PLUGIN = """
import numpy as np
from zoo import Batch, Task, register_task

@register_task("first_token")
class FirstToken(Task):
    seq_len: int = 8
    length = property(lambda self: self.seq_len)
    vocabulary = property(lambda self: 1000)
    slice_name = property(lambda self: f"T={self.seq_len}")

    def generate(self, n, rng):
        tokens = rng.integers(1000, size=(n, self.seq_len))
        return Batch(tokens, np.full((n, 1), self.seq_len - 1), tokens[:, :1] BUG, 0)
"""


def environment():
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_a_plugin_file_is_checked_in_another_process_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_registered", {})
    file = tmp_path / "theirs.py"
    file.write_text(PLUGIN.replace("BUG", ""))
    assert [c for c in check_task(f"{file}:FirstToken") if not c.passed] == []


def test_the_documented_example_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_registered", {})
    text = (Path(__file__).parent.parent / "docs" / "add_a_task.md").read_text()
    file = tmp_path / "documented.py"
    file.write_text(text.split("```python\n")[1].split("```")[0])
    assert [c for c in check_task(f"{file}:LookBack", {"back": 2}) if not c.passed] == []
    with pytest.raises(ConfigError, match=r"back 20 is not in \[0, 16\)"):
        check_task(f"{file}:LookBack", {"back": 20})


def test_the_pytest_class_in_a_repository_of_its_own(tmp_path):
    """A plugin's repository: its module, a few lines of test, pytest. A broken task fails by name."""
    (tmp_path / "theirs.py").write_text(PLUGIN.replace("BUG", "+ 500"))
    (tmp_path / "test_theirs.py").write_text(
        "import pytest, theirs\n"
        "from zoo.testing import TaskConformance\n"
        "class TestFirstToken(TaskConformance):\n"
        "    task = pytest.fixture(lambda self: theirs.FirstToken())\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-k", "vocabulary or pickl"]
    run = subprocess.run([*command, "test_theirs.py"], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert "FAILED test_theirs.py::TestFirstToken::test_tokens_in_vocabulary" in run.stdout, run.stdout + run.stderr
    assert f"1 failed, 1 passed, {len(CHECKS) - 2} deselected" in run.stdout


def test_checking_needs_neither_pytest_nor_torch_to_start():
    program = "import sys, zoo.testing.task; print({'pytest', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert run.stdout.strip() == "set()", run.stderr
