"""answer_loss in Triton, against its definition."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

from tests.triton_cases import count_launches
from zoo.kernels.answer_loss import answer_loss
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

pytest.importorskip("triton")
fused_module = importlib.import_module("zoo.kernels.answer_loss.triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, which has no GPU")
FP32 = TOLERANCES["answer_loss"][torch.float32]


def arguments(M, D=5, V=37, seed=0, dtype=torch.float32):
    """hidden and weight that ask for gradients; about a third of the answers are to be ignored."""
    draw = torch.Generator().manual_seed(seed)
    a = {
        "hidden": torch.randn(M, D, generator=draw).to(dtype).requires_grad_(),
        "weight": torch.randn(V, D, generator=draw).to(dtype).requires_grad_(),
    }
    answers = torch.randint(V, (M,), generator=draw)
    return a, answers.masked_fill(torch.rand(M, generator=draw) < 0.3, -100)


def op(impl, answers):
    return lambda hidden, weight: answer_loss(hidden, weight, answers, impl=impl).loss


@pytest.mark.parametrize("M", [1, 15, 16, 17, 63, 64, 65, 130])
def test_losses_and_gradients(M):
    a, answers = arguments(M)
    check_op(op("reference", answers), op("triton", answers), a, FP32)


@pytest.mark.parametrize(("D", "V"), [(1, 1), (17, 2), (33, 65), (16, 200)])
def test_odd_sizes(D, V):
    a, answers = arguments(9, D, V)
    check_op(op("reference", answers), op("triton", answers), a, FP32)


def test_more_channels_than_a_tile_has(monkeypatch):
    monkeypatch.setattr(fused_module, "_channels", lambda hidden: 16)
    a, answers = arguments(40, 37, 50)
    check_op(op("reference", answers), op("triton", answers), a, FP32)


def test_fp16_slopes_do_not_underflow():
    """At 2^-20, most slopes are below the smallest number of fp16; a head in fp32 has a gradient in fp32."""
    a, answers = arguments(40, dtype=torch.float16)
    a["weight"] = a["weight"].detach().float().requires_grad_()
    losses = [op(impl, answers)(**a) for impl in ("reference", "triton")]
    gradients = [torch.autograd.grad(loss.sum() * 2.0**-20, a["weight"])[0] for loss in losses]
    assert gradients[1].dtype == torch.float32
    assert (gradients[1] - gradients[0]).norm() < TOLERANCES["answer_loss"][torch.float16] * gradients[0].norm()


@pytest.mark.parametrize("programs", [1, 7])
def test_any_split_gives_the_same(programs, monkeypatch):
    a, answers = arguments(70, V=100)
    monkeypatch.setattr(fused_module, "PROGRAMS", programs)
    check_op(op("reference", answers), op("triton", answers), a, FP32)


@pytest.mark.parametrize("gradient", [False, True])
def test_predictions(gradient):
    """Answered right, wrong, and not asked for."""
    a, answers = arguments(50, V=100)
    want = answer_loss(**a, answers=answers, impl="reference").prediction
    answers = torch.where(torch.arange(50) % 3 == 0, want, answers)
    with torch.set_grad_enabled(gradient):
        got = answer_loss(**a, answers=answers, impl="triton").prediction
        assert got.dtype == torch.int64
        assert torch.equal(got, want)
        assert answer_loss(**a, answers=answers, predict=False, impl="triton").prediction.shape == (0,)


def test_the_slope_where_the_answer_is_almost_certain():
    """What is left of the probability counts, not what it rounds to beside 1."""
    a, answers = arguments(40, D=16)
    weight, answers = a["weight"].detach(), answers.clamp(min=0)
    reference, fused = (functools.partial(op(impl, answers), weight=weight) for impl in ("reference", "triton"))
    hidden = weight[answers].requires_grad_()
    assert 0 < reference(hidden).median() < 1e-2
    check_op(reference, fused, {"hidden": hidden}, FP32)


def test_large_logits_do_not_overflow():
    a, answers = arguments(20)
    a = {name: (20 * x).detach().requires_grad_() for name, x in a.items()}
    check_op(op("reference", answers), op("triton", answers), a, FP32)


def test_all_ignored_and_no_rows():
    a, answers = arguments(4)
    ignored = torch.full_like(answers, -100)
    loss = answer_loss(**a, answers=ignored, impl="triton").loss
    assert not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), list(a.values())))
    a, answers = arguments(0)
    loss, prediction = answer_loss(**a, answers=answers, impl="triton")
    assert loss.shape == prediction.shape == (0,)
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), list(a.values())))


def test_a_sound_custom_op():
    a, answers = arguments(9)
    hidden, weight = (x.detach()[None].requires_grad_() for x in a.values())
    torch.library.opcheck(fused_module._forward, (hidden, weight, answers[None], True, True))


def test_vmap_over_a_pack_of_models(monkeypatch):
    launches = count_launches(monkeypatch, fused_module.kernels)

    def run(hidden, weight, answers):
        return answer_loss(hidden, weight, answers, impl="triton").loss

    packs = [(*a.values(), answers) for a, answers in (arguments(9, seed=seed) for seed in (0, 1))]
    stacked = [torch.stack(x).detach() for x in zip(*packs, strict=True)]
    leaves = [x.requires_grad_() for x in stacked[:2]]
    together = torch.autograd.grad(torch.func.vmap(run)(*stacked).square().sum(), leaves)
    assert launches == {"forward_kernel": 1, "combine_kernel": 1, "backward_kernel": 1, "scale_kernel": 1}
    for i, pack in enumerate(packs):
        for got, want in zip(together, torch.autograd.grad(run(*pack).square().sum(), pack[:2]), strict=True):
            torch.testing.assert_close(got[i], want)
