from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zoo.errors import UnsupportedError
from zoo.kernels.answer_loss import answer_loss, chunked

pytestmark = pytest.mark.parametrize("impl", ["reference", "chunked"])


def problem(M, V, D=6, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, D, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=draw, dtype=dtype).requires_grad_()
    answers = torch.randint(V, (M,), generator=draw)
    return hidden, weight, answers


@pytest.mark.parametrize("V", [1, 7, 64, 192, 200])
@pytest.mark.parametrize("M", [1, 2, 3, 10])
def test_loss_prediction_and_gradients_are_those_of_cross_entropy(M, V, impl, monkeypatch):
    monkeypatch.setattr(chunked, "CPU_LOGITS", 3 * V)
    hidden, weight, answers = problem(M, V)
    answers[::3] = -100
    loss, prediction = answer_loss(hidden, weight, answers, impl=impl)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, answers, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(prediction, logits.argmax(1))
    alone, nothing = answer_loss(hidden, weight, answers, predict=False, impl=impl)
    assert torch.equal(alone, loss)
    assert nothing.shape == (0,)
    assert (loss[::3] == 0).all()
    slope = torch.linspace(-1, 2, M, dtype=torch.float64)
    ours = torch.autograd.grad(loss @ slope, (hidden, weight))
    theirs = torch.autograd.grad(expected @ slope, (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_no_rows(impl):
    hidden, weight, answers = problem(0, 8)
    loss, prediction = answer_loss(hidden, weight, answers, impl=impl)
    assert loss.shape == prediction.shape == (0,)
    loss.sum().backward()
    assert (weight.grad == 0).all()


def test_every_row_ignored(impl):
    hidden, weight, answers = problem(4, 8)
    loss, prediction = answer_loss(hidden, weight, torch.full_like(answers, -100), impl=impl)
    assert torch.equal(prediction, (hidden @ weight.T).argmax(1))
    loss.sum().backward()
    assert (loss == 0).all()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_logits_of_a_thousand_do_not_overflow(impl):
    hidden, weight, answers = problem(6, 128, dtype=torch.float32)
    scaled = (hidden * 1000).detach().requires_grad_()
    loss, _ = answer_loss(scaled, weight, answers, impl=impl)
    expected = F.cross_entropy((scaled.double() @ weight.double().T), answers, reduction="none")
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-3)
    loss.sum().backward()
    assert torch.isfinite(scaled.grad).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_accumulates_in_fp32(impl, autocast):
    hidden, weight, answers = problem(9, 256, D=64, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = answer_loss(hidden, weight, answers, impl=impl)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(exact[0] @ exact[1].T, answers, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    expected.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, rtol=1e-2, atol=1e-2)


def test_never_more_than_a_chunk_of_logits(impl, monkeypatch):
    hidden, weight, answers = problem(50, 64)
    monkeypatch.setattr(chunked, "CPU_LOGITS", 5 * 64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        loss, _ = answer_loss(hidden, weight, answers, impl=impl)
        loss.sum().backward()
    # The weight and its gradient hold 64 * 6 numbers, a chunk 5 * 64; all the logits would be 50 * 64.
    assert largest == (64 * 6 if impl == "chunked" else 50 * 64)


def test_what_does_not_fit_is_named(impl):
    hidden, weight, answers = problem(4, 8)
    with pytest.raises(UnsupportedError, match=r"weight has shape \(6, 8\)"):
        answer_loss(hidden, weight.T, answers, impl=impl)
    with pytest.raises(UnsupportedError, match=r"answers has shape \(3,\)"):
        answer_loss(hidden, weight, answers[:3], impl=impl)
    with pytest.raises(UnsupportedError, match=r"torch\.int32"):
        answer_loss(hidden, weight, answers.int(), impl=impl)
    with pytest.raises(UnsupportedError, match="no backend 'fused'"):
        answer_loss(hidden, weight, answers, impl="fused")
