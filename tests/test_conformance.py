"""The conformance checker: each check fails on a mixer broken in just that way, and a sound mixer passes all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import broken_mixers as broken
import pytest

from zoo.errors import ConfigError, ConformanceError, PluginError, UnknownNameError
from zoo.testing import Check, MixerConformance, check_mixer, render
from zoo.testing.mixer import CHECKS
from zoo.testing.report import run_check

OUTPUT = "output"
LENGTHS = "lengths"
CAUSALITY = "causality"
GRADIENT_CAUSALITY = "causality of gradients"
SCAN = "forward is scan of step"
PREFILL = "prefill then step is forward"
SEGMENTS = "prefill in segments is forward"
AT = "forward at is forward"
BATCH_FIRST = "state is batch first"
ROUND_TRIP = "state round trip"
MEMORY = "no memory outside state"
ARGUMENTS = "arguments are left alone"
SIZE = "state size"
BATCH = "batch invariance"
LAYOUT = "memory layout"
REACH = "gradients reach every parameter"
DIFFERENCES = "gradients match finite differences"
FLOAT64 = "float64"
TRAIN = "train is eval"
DETERMINISM = "determinism"
RANDOM = "no random numbers"
CONFIG = "config round trip"
PICKLE = "pickle and deepcopy"
LAYERS = "every layer"

# Each broken mixer, the checks that must fail, and what the first of them must say.
BROKEN = [
    (broken.WrongDtype, {OUTPUT}, "forward gives (3, 70, 16) torch.float64"),
    (broken.NoSingleToken, {LENGTHS}, "forward of 1 tokens, against forward of 160: the shapes differ, (2, 16)"),
    (broken.TableTooShort, {LENGTHS, SCAN}, "crashed: IndexError: index 128 is out of bounds"),
    (broken.LeaksARounding, {CAUSALITY}, "output at position 0 depends on input at position 1"),
    (broken.LeaksAGradient, {GRADIENT_CAUSALITY}, "output at position 0 depends on input at position 1: its gradient"),
    (
        broken.LooksAhead,
        {CAUSALITY, GRADIENT_CAUSALITY, LENGTHS, SCAN, PREFILL, SEGMENTS},
        "output at position 0 depends on input at position 4",
    ),
    (broken.LooksAheadLate, {SCAN}, "steps from init_state, against forward: positions 128, 129, 130, 131 and 27 more"),
    (broken.StartsElsewhere, {SCAN}, "steps from init_state, against forward: positions 0, 1, 2, 3 and"),
    (broken.ForgetsRotation, {SCAN}, "with rotary positions: all 20 positions differ"),
    (broken.Epsilon, {SCAN}, "of the output's scale (allowed 1e-09), at row 2, position 0"),
    (broken.ReservesInVain, {SCAN}, "steps in a reserved state, against forward, with rotary positions: positions 1,"),
    (broken.ReservesTooLittle, {SCAN}, "'log': (2, 21)} for one of {'h': (2, 16), 'last': (2, 16), 'log': (2, 20)};"),
    (broken.PrefillScalesState, {PREFILL}, "prefill of 1 tokens and 8 steps, against forward: positions 1, 2, 3, 4"),
    (
        broken.PrefillStartsAfresh,
        {SEGMENTS},
        "prefill cut at 35, against forward: positions 35, 36, 37, 38 and 31 more",
    ),
    (
        broken.PrefillDropsLast,
        {PREFILL, SEGMENTS},
        "prefill of 1 tokens and 8 steps, against forward: positions 1, 2, 3, 4",
    ),
    (broken.AsksTheNext, {AT}, "forward_at, against forward at those positions: all 5 positions differ"),
    (broken.UnnamedState, {BATCH_FIRST}, "the state after a step holds {'0': 'torch.float32 on cpu'"),
    (broken.BatchLast, {BATCH_FIRST, SIZE}, "state tensor 'h' of init_state has shape (16, 3); its first axis must be"),
    (broken.RandomConstant, {ROUND_TRIP}, "a fresh module with the saved weights and state, against going on"),
    (broken.KeepsStateForSpeed, {MEMORY}, "the first of two sequences decoded in turns: "),
    (broken.HidesLast, {MEMORY, BATCH_FIRST, ROUND_TRIP}, "the first of two sequences decoded in turns: "),
    (broken.StepsInPlace, {ARGUMENTS}, "state tensor 'h' after step, against before: 48 of 48 elements differ"),
    (broken.Grows, {SIZE}, "log 0 float32) after 0 tokens, 132 bytes (h 16 float32, last 16 float32, log 1 float32)"),
    (broken.GrowsLater, {SIZE}, "state_horizon is 8, but the state is 160 bytes"),
    (broken.ClaimsToGrow, {SIZE}, "it is 128 bytes after 1 token and 128 after 70; return 0"),
    (broken.MixesBatch, {BATCH}, "forward of row 0 alone, against the batch: all 70 positions differ"),
    (broken.NeedsContiguous, {LAYOUT}, "crashed: RuntimeError: view size is not compatible"),
    (broken.NeedsContiguousGradient, {LAYOUT}, "for an output's gradient that is an expanded scalar: all 70 positions"),
    (broken.UnusedParameter, {REACH}, "parameter 'forgotten' (3,) gets no gradient"),
    (broken.DetachedParameter, {REACH}, "parameter 'previous' (16,) gets no gradient"),
    (
        broken.InfiniteGradient,
        {REACH, DIFFERENCES},
        "the gradient of parameter 'previous' (16,) has 16 NaN or infinite",
    ),
    (broken.GradientOnePercentOff, {DIFFERENCES}, "the gradient of the input (2, 70, 16) is wrong by 1"),
    (broken.SinglePrecisionState, {FLOAT64}, "state tensor 'h' of init_state is torch.float32 in a module in fp64"),
    (broken.SinglePrecisionInside, {FLOAT64, DIFFERENCES}, "is something computed in fp32?): all 70 positions differ"),
    (broken.Dropout, {TRAIN}, "forward in train(), against eval(): all 70 positions differ"),
    (broken.SeedsItself, {DETERMINISM}, "'previous' as initialised, built and run again with the same seed: 16 of 16"),
    (broken.DrawsNumbers, {RANDOM}, "forward draws from torch's generator"),
    (
        broken.Drifts,
        {MEMORY, CAUSALITY, SCAN, PREFILL, SEGMENTS, FLOAT64, DIFFERENCES, PICKLE},
        "forward called again, another input in between: ",
    ),
    (broken.TakesAnyKey, {CONFIG}, "the unknown key 'no_such_option' is taken in silence"),
    (broken.ChangeableConfig, {CONFIG}, "the field 'bias' of a config can be set"),
    (broken.ForgetsConfig, {CONFIG}, "the mixer keeps Config(bias=1.0)"),
    (broken.HoldsALambda, {PICKLE}, "local object 'HoldsALambda.__init__.<locals>.<lambda>'"),
    (broken.LoneLayer, {LAYERS}, "in __init__, as the only layer)"),
    (broken.OfOneWidth, {LAYERS}, "in step, as a layer of d_model 32)"),
]


@pytest.mark.parametrize("mixer", [broken.Sound, broken.GrowsHonestly, broken.ConstantAfter100])
def test_sound_mixers_pass(mixer):
    checks = check_mixer(mixer, d_model=16)
    assert [c.name for c in checks] == ["builds", *CHECKS]
    assert [c for c in checks if not c.passed] == []
    assert all(c.detail for c in checks)


@pytest.mark.parametrize(("mixer", "expected", "says"), BROKEN, ids=[cls.__name__ for cls, *_ in BROKEN])
def test_broken_mixers_fail_there_and_only_there(mixer, expected, says):
    failed = {c.name: c.detail for c in check_mixer(mixer, d_model=16) if not c.passed}
    assert set(failed) == expected, failed
    assert any(says in detail for detail in failed.values()), failed


def test_every_check_has_a_mixer_that_fails_nothing_else():
    assert {name for _, expected, _ in BROKEN if len(expected) == 1 for name in expected} == set(CHECKS)


def test_a_rounding_leak_is_called_one():
    causality = next(c for c in check_mixer(broken.LeaksARounding, d_model=16) if c.name == CAUSALITY)
    assert causality.detail.endswith(
        "That is rounding: of an FFT, or of a scale that earlier and later positions share"
    )
    assert "69 of 2415" in causality.detail


def test_not_a_number_is_no_leak():
    checks = {c.name: c.detail for c in check_mixer(broken.NotANumber, d_model=16) if not c.passed}
    assert "forward gives 3360 NaN or infinite elements" in checks[OUTPUT]
    assert checks[CAUSALITY].startswith("forward gives 78400 of 78400 elements NaN or infinite; mend that first")
    assert "depends on" not in checks[CAUSALITY] + checks[GRADIENT_CAUSALITY]


def test_a_crash_is_a_failed_check_and_the_others_go_on():
    checks = {c.name: c for c in check_mixer(broken.StepCrashes, d_model=16)}
    assert list(checks) == ["builds", *CHECKS]
    assert not checks[SCAN].passed
    assert checks[SCAN].detail.startswith("crashed: IndexError: list index out of range (at broken_mixers.py:")
    assert checks[SCAN].detail.endswith(" in step)")
    assert checks[CAUSALITY].passed
    assert checks[SEGMENTS].passed


def test_what_cannot_be_built_is_one_finding():
    (check,) = check_mixer(broken.CannotBeBuilt, d_model=16)
    assert (check.name, check.passed) == ("builds", False)
    assert check.detail.startswith("crashed: RuntimeError: no weights here (at broken_mixers.py:")


def test_a_mixer_without_a_recurrent_form_is_one_finding_that_says_what_to_define():
    (check,) = check_mixer(broken.HasNoRecurrentForm, d_model=16)
    assert (check.name, check.passed) == ("builds", False)
    assert check.detail.startswith("HasNoRecurrentForm does not define init_state and step; a mixer needs")


def test_wrong_subjects_and_options_are_the_callers_errors():
    with pytest.raises(PluginError, match=r"<class 'int'> is not a subclass of zoo.Mixer"):
        check_mixer(int)
    with pytest.raises(UnknownNameError, match=r"unknown mixer 'atention'. Did you mean 'attention'"):
        check_mixer("atention")
    with pytest.raises(ConfigError, match=r"unknown key 'bais'. Did you mean 'bias'"):
        check_mixer(broken.Sound, {"bais": 1.0})
    with pytest.raises(ConfigError, match="bias"):
        check_mixer(broken.Sound, {"bias": "many"})


def test_the_report_is_aligned_and_counts():
    text = render([Check("a", True, "fine"), Check("a longer name", False, "broken:\nhere"), Check("b", True, "")])
    assert text.splitlines() == [
        "  pass  a              fine",
        "  FAIL  a longer name  broken:",
        "                       here",
        "  pass  b",
        "2 of 3 checks passed, 1 FAILED",
    ]
    assert render([]) == "0 of 0 checks passed"


def test_run_check_tells_a_finding_from_a_crash():
    def finds():
        raise ConformanceError("not so")

    assert run_check("x", finds) == Check("x", False, "not so")
    assert run_check("x", lambda: "as it should") == Check("x", True, "as it should")
    assert run_check("x", lambda: str(1 / 0)).detail.startswith(
        "crashed: ZeroDivisionError: division by zero (at test_c"
    )


class TestInheritance(MixerConformance):
    """What a plugin's author writes, with two configs and a width of its own."""

    @pytest.fixture
    def mixer_class(self):
        return broken.Sound

    @pytest.fixture(params=[{}, {"bias": 0.5}], ids=["default", "bias"])
    def mixer_config(self, request):
        return request.param

    @pytest.fixture
    def d_model(self):
        return 8


def test_the_pytest_class_has_every_check():
    tests = {name.removeprefix("test_").replace("_", " ") for name in dir(MixerConformance) if name.startswith("test_")}
    assert tests == set(CHECKS)


def test_the_pytest_class_in_a_repository_of_its_own(tmp_path):
    """A plugin's repository: its module, four lines of test, pytest. A broken mixer fails by name."""
    (tmp_path / "theirs.py").write_text(
        "from zoo import Mixer\n"
        "from zoo.mixers.base import LayerInfo\n"
        "class Identity(Mixer):\n"
        "    def forward(self, x): return x.flip(1)\n"
        "    def init_state(self, batch_size): return None\n"
        "    def step(self, x_t, state): return x_t, None\n"
    )
    (tmp_path / "test_theirs.py").write_text(
        "import pytest, theirs\n"
        "from zoo.testing import MixerConformance\n"
        "class TestIdentity(MixerConformance):\n"
        "    mixer_class = pytest.fixture(lambda self: theirs.Identity)\n"
    )
    options = ("-q", "-p", "no:cacheprovider", "--tb=line", "-k", "causality or scan or pickle")
    command = [sys.executable, "-m", "pytest", *options, "test_theirs.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment())
    assert "depends on input at position" in run.stdout, run.stdout + run.stderr
    assert "FAILED test_theirs.py::TestIdentity::test_causality" in run.stdout
    assert "FAILED test_theirs.py::TestIdentity::test_forward_is_scan_of_step" in run.stdout
    assert "test_pickle_and_deepcopy" not in run.stdout
    assert f"3 failed, 1 passed, {len(CHECKS) - 4} deselected" in run.stdout


def test_checking_needs_no_pytest():
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "import zoo.testing\n"
        "from zoo.testing import check_mixer, render\n"
        "import broken_mixers\n"
        "checks = check_mixer(broken_mixers.Sound, d_model=8)\n"
        "print(render(checks).splitlines()[-1])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert run.stdout.strip() == f"{len(CHECKS) + 1} of {len(CHECKS) + 1} checks passed", run.stderr


def _environment():
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
