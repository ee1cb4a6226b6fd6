"""short_conv and long_conv in Triton, against their recurrences."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

from tests.triton_cases import LENGTHS, count_launches, inputs
from zoo.kernels.launch import Config
from zoo.kernels.long_conv import long_conv
from zoo.kernels.short_conv import short_conv
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

pytest.importorskip("triton")
short_triton = importlib.import_module("zoo.kernels.short_conv.triton")
long_triton = importlib.import_module("zoo.kernels.long_conv.triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, which has no GPU")
FP32 = {op: TOLERANCES[op][torch.float32] for op in ("short_conv", "long_conv")}
SHORT = {"x": "BTD", "weight": "DW", "bias": "D", "initial_state": "BPD"}
LONG = {"u": "BTD", "kernel": "DL", "skip": "D", "gate": "BTD", "past": "BPD"}

short_reference = partial(short_conv, impl="reference")
short_fused = partial(short_conv, impl="triton")
long_reference = partial(long_conv, impl="reference")
long_fused = partial(long_conv, impl="triton")


def short_inputs(T, D=3, W=4, B=2, seed=0, without=()):
    shapes = {name: letters for name, letters in SHORT.items() if name not in without}
    return inputs(T, shapes, B=B, D=D, W=W, P=W - 1, seed=seed)


@pytest.mark.parametrize("T", LENGTHS)
def test_short_conv(T):
    silu = {"activation": "silu"}
    check_op(partial(short_reference, **silu), partial(short_fused, **silu), short_inputs(T), FP32["short_conv"])
    bare = short_inputs(T, seed=1, without=("bias", "initial_state"))
    check_op(short_reference, short_fused, bare, FP32["short_conv"])
    gate = inputs(T, {"gate": "BTD"}, B=2, D=3, seed=2)
    check_op(partial(short_reference, **silu), partial(short_fused, **silu), short_inputs(T) | gate, FP32["short_conv"])
    check_op(short_reference, short_fused, bare | gate, FP32["short_conv"])


@pytest.mark.parametrize(("D", "W"), [(1, 1), (17, 2), (130, 3), (5, 8)])
def test_short_conv_of_odd_sizes(D, W):
    silu = {"activation": "silu"}
    a = short_inputs(5, D, W, B=1, without=() if W > 1 else ("initial_state",))
    check_op(partial(short_reference, **silu), partial(short_fused, **silu), a, FP32["short_conv"])


def test_short_conv_takes_strided_inputs_and_other_dtypes_of_weights():
    a = short_inputs(20)
    wide = torch.randn(2, 20, 9, generator=torch.Generator().manual_seed(2))
    a["x"] = wide[..., 4:7].requires_grad_()
    check_op(short_reference, short_fused, a, FP32["short_conv"])
    a["x"] = wide[..., 4:7].half().requires_grad_()
    check_op(short_reference, short_fused, a, TOLERANCES["short_conv"][torch.float16])


@pytest.mark.parametrize("T", [1, 2, 5])
def test_the_cache_continues_a_sequence(T):
    a = short_inputs(T + 4)
    whole, last = short_fused(**a)
    _, cache = short_fused(a["x"][:, :T], a["weight"], a["bias"], initial_state=a["initial_state"])
    y, end = short_fused(a["x"][:, T:], a["weight"], a["bias"], initial_state=cache)
    torch.testing.assert_close(y, whole[:, T:])
    torch.testing.assert_close(end, last)
    cache = short_fused(a["x"][:, :T], a["weight"])[1]
    assert torch.equal(cache, short_reference(a["x"][:, :T], a["weight"])[1])


def test_short_conv_is_a_sound_custom_op():
    x, weight, bias, first = (a.detach() for a in short_inputs(5, W=2).values())
    x, weight, bias, first = (a.requires_grad_() for a in (x, weight[None], bias[None], first))
    gate = torch.rand(x.shape).requires_grad_()
    for extra in ((None, None, None, False), (bias, gate, first, True)):
        torch.library.opcheck(short_triton._forward, (x, weight, *extra))


def test_short_conv_under_vmap(monkeypatch):
    """A pack of models, each with weights of its own, in as many launches as one."""
    launches = count_launches(monkeypatch, short_triton.kernels)

    def run(x, weight, bias):
        return short_fused(x, weight, bias, "silu", return_state=False)[0]

    packs = [list(short_inputs(9, seed=seed, without=("initial_state",)).values()) for seed in (0, 1)]
    stacked = [torch.stack(x).detach().requires_grad_() for x in zip(*packs, strict=True)]
    together = torch.autograd.grad(torch.func.vmap(run)(*stacked).square().sum(), stacked)
    assert launches == {"forward_kernel": 1, "backward_kernel": 1, "sum_kernel": 1}
    for i, pack in enumerate(packs):
        for got, want in zip(together, torch.autograd.grad(run(*pack).square().sum(), pack), strict=True):
            torch.testing.assert_close(got[i], want)


def long_inputs(T, L=None, P=5, D=2, B=2, seed=0, without=()):
    shapes = {name: letters for name, letters in LONG.items() if name not in without}
    return inputs(T, shapes, B=B, D=D, L=T if L is None else L, P=P, seed=seed)


@pytest.mark.parametrize("T", LENGTHS)
def test_long_conv(T):
    check_op(long_reference, long_fused, long_inputs(T, without=("past",)), FP32["long_conv"])
    check_op(long_reference, long_fused, long_inputs(T, L=T + 9, B=1, seed=1, without=("gate",)), FP32["long_conv"])


@pytest.mark.parametrize(("T", "L", "B"), [(50, 3, 2), (128, 128, 1), (129, 129, 1), (70, 40, 33)])
def test_long_conv_block_by_block_and_all_at_once(T, L, B):
    """Kernels that reach a block back, and all of them; one more block than a program holds; two blocks of rows."""
    check_op(long_reference, long_fused, long_inputs(T, L, D=1, B=B, without=("gate", "past")), FP32["long_conv"])


@pytest.mark.parametrize(("T", "L", "P", "B"), [(40, 1, 70, 1), (1, 50, 49, 1), (70, 33, 31, 1), (5, 90, 64, 33)])
def test_long_conv_of_other_lengths(T, L, P, B):
    """Kernels shorter and longer than what they meet; few outputs for a long past; more sequences than a block."""
    check_op(long_reference, long_fused, long_inputs(T, L, P, D=1, B=B, without=("skip",)), FP32["long_conv"])


def test_long_conv_beyond_the_direct_form(monkeypatch):
    monkeypatch.setattr(long_triton, "LONGEST", 16)
    check_op(long_reference, long_fused, long_inputs(40, P=3), FP32["long_conv"])
    check_op(long_reference, long_fused, long_inputs(40, L=7, without=("gate", "skip", "past")), FP32["long_conv"])


@pytest.mark.parametrize("longest", [4096, 16], ids=["direct", "fourier"])
def test_long_conv_with_time_last(longest, monkeypatch):
    monkeypatch.setattr(long_triton, "LONGEST", longest)
    forms = (partial(form, time_last=True) for form in (long_reference, long_fused))
    check_op(*forms, long_inputs(40, P=3, without=("gate",)), FP32["long_conv"])


def test_long_conv_takes_strided_inputs_in_many_parts(monkeypatch):
    monkeypatch.setattr(long_triton, "pairs_config", lambda x: Config(16, 16, 1, 1))
    a = long_inputs(20, B=40, without=("past",))
    wide = torch.randn(40, 20, 9, generator=torch.Generator().manual_seed(2))
    a |= {"u": wide[..., 1:3].requires_grad_(), "gate": wide[..., 4:6].requires_grad_()}
    check_op(long_reference, long_fused, a, FP32["long_conv"])


def test_long_conv_is_exactly_causal():
    a = long_inputs(40)
    y = long_fused(**a)
    a["u"] = torch.cat([a["u"][:, :25], torch.full_like(a["u"][:, 25:], 1e30)], dim=1)
    assert torch.equal(long_fused(**a)[:, :25], y[:, :25])


def test_long_conv_is_a_sound_custom_op():
    a = long_inputs(5, without=("past",))
    u, kernel, skip, gate = (a[n].detach() for n in ("u", "kernel", "skip", "gate"))
    u, kernel, skip, gate = (x.requires_grad_() for x in (u, kernel[None], skip[None], gate))
    for extra in ((None, None, 5, False), (skip, gate[:, :3].detach(), 3, False), (skip, None, 3, True)):
        torch.library.opcheck(long_triton._forward, (u, kernel, *extra))


@pytest.mark.parametrize("longest", [4096, 4], ids=["direct", "fourier"])
def test_long_conv_under_vmap(longest, monkeypatch):
    monkeypatch.setattr(long_triton, "LONGEST", longest)
    launches = count_launches(monkeypatch, long_triton.kernels)
    packs = [list(long_inputs(9, seed=seed, without=("past",)).values()) for seed in (0, 1)]
    stacked = [torch.stack(x).detach().requires_grad_() for x in zip(*packs, strict=True)]
    together = torch.autograd.grad(torch.func.vmap(long_fused)(*stacked).square().sum(), stacked)
    products = {"taps_kernel": 2, "convolve_short_kernel": 2, "pairs_short_kernel": 1, "diagonals_kernel": 1}
    assert launches == {"turn_kernel": 4} | (products if longest > 9 else {})
    for i, pack in enumerate(packs):
        for got, want in zip(together, torch.autograd.grad(long_fused(*pack).square().sum(), pack), strict=True):
            torch.testing.assert_close(got[i], want)
