"""long_conv: both CPU forms against the direct sum and torch.fft, causality, gradients and errors."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import UnsupportedError
from zoo.kernels.long_conv import chunked, long_conv

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
FORMS = {"direct": 10**9, "fourier": 0}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Either CPU form at every length."""
    monkeypatch.setattr(chunked, "DIRECT_TAPS", FORMS[request.param])
    return request.param


def arguments(B=2, T=17, D=5, L=None, P=0, *, dtype=torch.float64, seed=0):
    """u, kernel, skip, gate and, where P > 0, the P inputs before u."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"u": (B, T, D), "kernel": (D, T if L is None else L), "skip": (D,), "gate": (B, T, D)}
    if P:
        shapes["past"] = (B, P, D)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for name, shape in shapes.items()
    }


def by_fft(u, kernel):
    n = u.shape[1] + kernel.shape[1]
    product = torch.fft.rfft(u, n=n, dim=1) * torch.fft.rfft(kernel, n=n).T
    return torch.fft.irfft(product, n=n, dim=1)[:, : u.shape[1]]


def gradients(impl, a):
    y = long_conv(**a, impl=impl)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((weights * y).sum(), list(a.values()))


@pytest.mark.parametrize("T", LENGTHS)
def test_every_form_equals_torch_fft(form, T):
    for L in (T, T + 9, max(1, T // 3)):
        a = arguments(T=T, L=L)
        expected = a["gate"] * (by_fft(a["u"], a["kernel"]) + a["skip"] * a["u"])
        torch.testing.assert_close(long_conv(**a, impl="reference"), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(long_conv(**a), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(long_conv(a["u"], a["kernel"]), by_fft(a["u"], a["kernel"]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("T", LENGTHS)
def test_gradients_of_every_input(form, T):
    for L in (T, T + 9, max(1, T // 3)):
        a = arguments(T=T, L=L)
        for name, got, expected in zip(a, gradients("chunked", a), gradients("reference", a), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize(
    ("P", "T", "L"), [(1, 1, 2), (63, 1, 64), (40, 33, 73), (40, 33, 99), (100, 20, 7), (5, 70, 30)]
)
def test_a_past_continues_the_sequence(form, P, T, L):
    a = arguments(T=T, L=L, P=P)
    whole = long_conv(torch.cat([a["past"], a["u"]], 1), a["kernel"], a["skip"])[:, P:] * a["gate"]
    torch.testing.assert_close(long_conv(**a), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(long_conv(**a, impl="reference"), whole, rtol=1e-11, atol=1e-11)
    ungated = {name: x for name, x in a.items() if name != "gate"}
    for impl in ("reference", "chunked"):
        turned = long_conv(**ungated, time_last=True, impl=impl)
        torch.testing.assert_close(turned.mT * a["gate"], whole, rtol=1e-11, atol=1e-11)
    for name, got, expected in zip(a, gradients("chunked", a), gradients("reference", a), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"d{name}: {m}")


def test_an_impulse_returns_the_kernel(form):
    kernel = torch.randn(3, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    impulse = torch.zeros(1, 80, 3, dtype=torch.float64)
    impulse[:, 7] = 1
    y = long_conv(impulse, kernel)
    torch.testing.assert_close(y[0, 7:77], kernel.T)
    torch.testing.assert_close(y[0, :7], torch.zeros(7, 3, dtype=torch.float64))
    torch.testing.assert_close(y[0, 77:], torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("T", [64, 257])
def test_fp32_error_is_rounding(form, T):
    a = arguments(B=4, T=T, D=8, dtype=torch.float32)
    exact = long_conv(**{name: t.double() for name, t in a.items()}, impl="reference")
    assert (long_conv(**a) - exact).abs().max() < 1e-5 * exact.abs().max()
    exact = gradients("reference", {name: t.detach().double().requires_grad_() for name, t in a.items()})
    for got, expected in zip(gradients("chunked", a), exact, strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("t", [1, 31, 32, 40, 99])
def test_causal_to_the_last_bit_up_to_the_direct_limit(t):
    a = {name: x.detach() for name, x in arguments(T=100, dtype=torch.float32).items()}
    assert a["kernel"].shape[1] <= chunked.DIRECT_TAPS
    changed = a["u"].clone()
    changed[:, t:] = 1e6
    y, y_changed = long_conv(**a), long_conv(**{**a, "u": changed})
    assert torch.equal(y[:, :t], y_changed[:, :t])
    assert not torch.equal(y[:, t], y_changed[:, t])


def test_long_sequences_take_the_fourier_form_and_agree(monkeypatch):
    a = arguments(B=1, T=chunked.DIRECT_TAPS + 3, D=2)
    y = long_conv(**a)
    monkeypatch.setattr(chunked, "DIRECT_TAPS", 10**9)
    direct = long_conv(**a)
    assert not torch.equal(y, direct)
    torch.testing.assert_close(y, direct, rtol=1e-11, atol=1e-11)


def test_bfloat16_is_summed_in_fp32(form):
    a = {name: t.detach().bfloat16() for name, t in arguments(T=100).items()}
    exact = long_conv(**{name: t.double() for name, t in a.items()}, impl="reference")
    y = long_conv(**a)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 5)}, "u has shape"),
        ({"kernel": torch.zeros(4, 17)}, r"kernel has shape \(4, 17\); expected \(D=5, L\)"),
        ({"skip": torch.zeros(5, 1)}, "skip has shape"),
        ({"gate": torch.zeros(2, 16, 5)}, r"gate has shape \(2, 16, 5\); expected \(B=2, T=17, D=5\)"),
        ({"past": torch.zeros(3, 4, 5)}, r"past has shape \(3, 4, 5\); expected \(B=2, P, D=5\)"),
        ({"kernel": torch.zeros(5, 0)}, "no axis may be empty"),
        ({"impl": "conv"}, "no backend 'conv'"),
    ],
)
def test_errors(change, message):
    with pytest.raises(UnsupportedError, match=message):
        long_conv(**{**arguments(), **change})
