"""short_conv and long_conv in Triton, against their recurrences."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

from tests.triton_cases import LENGTHS, inputs
from zoo.kernels.short_conv import short_conv
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

pytest.importorskip("triton")
short_triton = importlib.import_module("zoo.kernels.short_conv.triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, which has no GPU")
FP32 = {op: TOLERANCES[op][torch.float32] for op in ("short_conv", "long_conv")}
SHORT = {"x": "BTD", "weight": "DW", "bias": "D", "initial_state": "BPD"}

short_reference = partial(short_conv, impl="reference")
short_fused = partial(short_conv, impl="triton")


def short_inputs(T, D=3, W=4, B=2, seed=0, without=()):
    shapes = {name: letters for name, letters in SHORT.items() if name not in without}
    return inputs(T, shapes, B=B, D=D, W=W, P=W - 1, seed=seed)


@pytest.mark.parametrize("T", LENGTHS)
def test_short_conv(T):
    silu = {"activation": "silu"}
    check_op(partial(short_reference, **silu), partial(short_fused, **silu), short_inputs(T), FP32["short_conv"])
    bare = short_inputs(T, seed=1, without=("bias", "initial_state"))
    check_op(short_reference, short_fused, bare, FP32["short_conv"])


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
    x, weight, bias, first = (a.detach() for a in short_inputs(5).values())
    x, weight, bias, first = (a.requires_grad_() for a in (x, weight[None], bias[None], first))
    for extra in ((None, None, False), (bias, first, True)):
        torch.library.opcheck(short_triton._forward, (x, weight, *extra))


def test_short_conv_under_vmap():
    """A pack of models, each with weights of its own."""

    def run(x, weight, bias):
        return short_fused(x, weight, bias, "silu", return_state=False)[0]

    packs = [list(short_inputs(9, seed=seed, without=("initial_state",)).values()) for seed in (0, 1)]
    stacked = [torch.stack(x).detach().requires_grad_() for x in zip(*packs, strict=True)]
    together = torch.autograd.grad(torch.func.vmap(run)(*stacked).square().sum(), stacked)
    for i, pack in enumerate(packs):
        for got, want in zip(together, torch.autograd.grad(run(*pack).square().sum(), pack), strict=True):
            torch.testing.assert_close(got[i], want)
