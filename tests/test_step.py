"""One token of a decode: every op's step in torch and in Triton against its recurrence, and when it is taken."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.triton_cases import decays, inputs
from zoo.errors import UnsupportedError
from zoo.kernels.backend import step_backend
from zoo.kernels.delta_rule import delta_rule, generalized_delta_rule
from zoo.kernels.linear_recurrence import linear_recurrence
from zoo.kernels.selective_scan import selective_scan
from zoo.kernels.short_conv import short_conv
from zoo.kernels.taylor_attention import TaylorState, taylor_attention
from zoo.kernels.wkv import WKVState, wkv
from zoo.state import map_tensors, named_tensors
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, which has no GPU")
QKV = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "initial_state": "BHKV"}
SIZES = {"B": 2, "H": 2, "K": 17, "V": 5}


def linear(decay=None, bonus=False):
    def make(seed):
        a = inputs(1, QKV | ({"bonus": "HK"} if bonus else {}), seed=seed, **SIZES)
        shapes = {"head": (2,), "step": (2, 1, 2), "channel": (2, 1, 2, 17)}
        return a if decay is None else a | {"decay": decays(*shapes[decay], seed=seed)}

    return linear_recurrence, make


def delta(decay=None, generalized=False):
    def make(seed):
        extra = {"a": "BTHK", "b": "BTHK"} if generalized else {"beta": "BTH"}
        a = inputs(1, QKV | extra, seed=seed, **SIZES)
        shapes = {"step": (2, 1, 2), "channel": (2, 1, 2, 17)}
        return a if decay is None else a | {"decay": decays(*shapes[decay], seed=seed)}

    return (generalized_delta_rule if generalized else delta_rule), make


def taylor(K, V):
    def make(seed):
        F = (K + 1) * (K + 2) // 2
        shapes = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "S": "BHFV", "z": "BHF"}
        a = inputs(1, shapes, B=2, H=2, K=K, V=V, F=F, seed=seed)
        # Far from 0, where the quotient would magnify every rounding.
        state = TaylorState(a.pop("S"), (20 + a.pop("z")).detach().requires_grad_())
        return a | {"initial_state": state}

    return taylor_attention, make


def scan(fixed=False, bare=False, bias=False):
    def make(seed):
        terms = {"B": "DN", "C": "DN"} if fixed else {"B": "STN", "C": "STN"}
        extra = ({} if bare else {"D": "D", "z": "STD"}) | ({"dt_bias": "D"} if bias else {})
        a = inputs(1, {"x": "STD", "initial_state": "SDN"} | terms | extra, S=3, D=5, N=3, seed=seed)
        a["dt"] = torch.full((5,) if fixed else (3, 1, 5), 0.3).requires_grad_()
        a["A"] = -torch.arange(1.0, 16.0).view(5, 3).requires_grad_()
        return a

    return selective_scan, make


def conv(W, bias=True, activation="silu"):
    def make(seed):
        shapes = {"x": "BTD", "weight": "DW", "initial_state": "BPD"} | ({"bias": "D"} if bias else {})
        return inputs(1, shapes, B=2, D=5, W=W, P=W - 1, seed=seed)

    return partial(short_conv, activation=activation), make


def average(seed):
    state = {"numerator": "BD", "denominator": "BD", "largest": "BD"}
    a = inputs(1, {"k": "BTD", "v": "BTD", "bonus": "D"} | state, B=2, D=5, seed=seed)
    numerator, denominator, largest = (a.pop(name) for name in state)
    a["decay"] = decays(5, seed=seed)
    return a | {"initial_state": WKVState(numerator, denominator.detach().exp().requires_grad_(), largest)}


CASES = {
    "linear": linear(),
    "linear head": linear("head"),
    "linear step": linear("step"),
    "linear channel": linear("channel"),
    "linear bonus": linear("channel", bonus=True),
    "delta": delta(),
    "delta step": delta("step"),
    "delta channel": delta("channel"),
    "generalized": delta(None, generalized=True),
    "generalized channel": delta("channel", generalized=True),
    "taylor": taylor(3, 5),
    "taylor 9": taylor(9, 33),
    "scan": scan(),
    "scan fixed": scan(fixed=True, bare=True),
    "scan bias": scan(bias=True),
    "conv": conv(4),
    "conv bare": conv(2, bias=False, activation=None),
    "wkv": (wkv, average),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["step", "step_triton"])
def test_one_step_equals_the_recurrence(name, impl):
    op, make = CASES[name]
    a = {n: map_tensors(torch.Tensor.detach, x) for n, x in make(0).items()}
    before = {n: x.clone() for n, x in named_tensors(a)}
    check_op(partial(op, impl="reference"), partial(op, impl=impl), a, TOLERANCES["linear_recurrence"][torch.float32])
    assert all(torch.equal(x, before[n]) for n, x in named_tensors(a))


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_taken_where_a_token_continues_a_state_without_a_gradient(name):
    op, make = CASES[name]
    a = make(0)
    with torch.no_grad():
        expected = dict(named_tensors(op(**a, impl="step")))
        got = dict(named_tensors(op(**a)))
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    # With a gradient, the op is differentiable all the same.
    check_op(partial(op, impl="reference"), op, a, TOLERANCES["linear_recurrence"][torch.float32])


def test_choice_of_a_step():
    x, state = torch.zeros(2), torch.zeros(2)
    assert step_backend(1, state, True, x, None, state) == "step"
    assert step_backend(2, state, True, x) is None
    assert step_backend(1, None, True, x) is None
    assert step_backend(1, state, False, x) is None
    assert step_backend(1, state, True, x, state.requires_grad_()) is None
    with torch.no_grad():
        assert step_backend(1, state, True, x, state) == "step"


@pytest.mark.parametrize("impl", ["step", "step_triton"])
@pytest.mark.parametrize("name", ["linear", "delta", "generalized", "taylor", "scan", "conv", "wkv"])
def test_more_or_less_than_a_step_is_refused(name, impl):
    op, make = CASES[name]
    a = make(0)
    with pytest.raises(UnsupportedError, match="not no initial_state"):
        op(**a | {"initial_state": None}, impl=impl)
    tokens = {n: x.expand(-1, 2, *x.shape[2:]) for n, x in a.items() if n in {*"qkvabxzBC", "beta", "dt"}}
    with pytest.raises(UnsupportedError, match="not T = 2"):
        op(**a | tokens, impl=impl)


def test_a_fused_step_refuses_a_gradient():
    op, make = CASES["linear"]
    with pytest.raises(UnsupportedError, match="has no gradient; pass impl='step'"):
        op(**make(0), impl="step_triton")


@pytest.mark.parametrize("name", CASES)
def test_fused_steps_under_vmap(name):
    """A pack of models, with parameters and decays of its own."""
    op, make = CASES[name]
    packs = [dict(named_tensors(make(seed))) for seed in (0, 1)]
    stacked = {n: torch.stack([pack[n] for pack in packs]).detach() for n in packs[0]}
    kind = type(make(0)["initial_state"])

    def run(tensors):
        x = {n: t for n, t in tensors.items() if "." not in n}
        state = [t for n, t in tensors.items() if n.startswith("initial_state.")]
        if state:
            x["initial_state"] = kind(*state)
        return dict(named_tensors(op(**x, impl="step_triton")))

    with torch.no_grad():
        together = torch.func.vmap(run)(stacked)
        for i, pack in enumerate(packs):
            for n, want in run(pack).items():
                torch.testing.assert_close(together[n][i], want)


@pytest.mark.parametrize("name", ["linear bonus", "generalized channel", "taylor", "scan", "conv", "wkv"])
def test_fused_steps_are_sound_custom_ops(name):
    """Their fake kernels agree with the real ones, and they leave their arguments as they were."""
    op, make = CASES[name]
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "zoo":
                calls.append((function, args))
            return function(*args, **kwargs or {})

    with torch.no_grad(), Record():
        op(**{n: map_tensors(torch.Tensor.detach, x) for n, x in make(0).items()}, impl="step_triton")
    ((function, args),) = calls
    torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))
