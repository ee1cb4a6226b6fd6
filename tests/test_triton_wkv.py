"""wkv in Triton, against its recurrence."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from test_wkv import FP32, SHAPES, arguments, detached
from triton_cases import LENGTHS, count_launches

from zoo.kernels.wkv import wkv
from zoo.testing.ops import check_op, op_errors

pytest.importorskip("triton")
from zoo.kernels.launch import Config, forced

fused_module = importlib.import_module("zoo.kernels.wkv.triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, which has no GPU")
reference, fused = (partial(wkv, impl=impl) for impl in ("reference", "triton"))


@pytest.mark.parametrize("T", LENGTHS)
def test_outputs_states_and_gradients(T):
    check_op(reference, fused, arguments(T, B=1), FP32)


@pytest.mark.parametrize(("T", "D"), [(3, 1), (9, 33)])
def test_odd_sizes_without_states(T, D):
    check_op(*(partial(op, return_state=False) for op in (reference, fused)), arguments(T, D=D, state=False), FP32)


@pytest.mark.parametrize("decay", [0.0, -1e-8, -20.0])
@pytest.mark.parametrize("keys", [1.0, 50.0])
def test_extremes(decay, keys):
    a = arguments(11, B=1, decay=decay, keys=keys)
    check_op(reference, fused, detached(a), 2 * FP32)
    errors = op_errors(reference, fused, a)
    assert max(errors[name] for name in ("dk", "dv", "dbonus")) < (1e-4 if keys > 1 else FP32)
    assert max(errors.values()) < float("inf")


def test_strided_inputs():
    a = arguments(10, B=1)
    wide = torch.randn(1, 10, 30, generator=torch.Generator().manual_seed(2))
    a |= {name: wide[..., i : i + 5].requires_grad_() for name, i in (("k", 1), ("v", 9))}
    check_op(reference, fused, a, FP32)


@pytest.mark.parametrize("state", [True, False])
def test_a_sound_custom_op(state):
    a = arguments(3, B=1, D=3, state=state)
    first = torch.stack(a["initial_state"], 1).detach().requires_grad_() if state else None
    shared = [a[name][None].detach().requires_grad_() for name in ("decay", "bonus")]
    with forced("wkv.walk", Config(chunk=2, block=4, num_warps=1, num_stages=1)):
        torch.library.opcheck(fused_module._forward, (a["k"], a["v"], *shared, first, state, True))


def test_vmap_over_a_pack_of_models(monkeypatch):
    launches = count_launches(monkeypatch, fused_module.kernels)

    def gradients(o, state, tensors):
        return torch.autograd.grad(o.square().sum() + sum(x.square().sum() for x in state), tensors)

    packs = [arguments(3, D=3, seed=seed, state=False) for seed in (0, 1)]
    stacked = [torch.stack([pack[n] for pack in packs]).detach().requires_grad_() for n in SHAPES]
    together = gradients(*torch.func.vmap(lambda *x: fused(*x))(*stacked), stacked)
    assert launches == {"forward_kernel": 1, "backward_kernel": 1}
    for i, pack in enumerate(packs):
        alone = list(pack.values())
        for got, want in zip(together, gradients(*fused(*alone), alone), strict=True):
            torch.testing.assert_close(got[i], want)


def test_nothing_is_kept_without_gradients():
    a = arguments(20, B=1)
    o, state = fused(**a)
    with torch.no_grad():
        alone, last = fused(**a)
    assert all(torch.equal(x, y) for x, y in zip((o, *state), (alone, *last), strict=True))
