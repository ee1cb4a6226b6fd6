"""selective_scan: the CPU backend against the recurrence, a closed form, its state, its gradients and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import UnsupportedError
from zoo.kernels.selective_scan import chunked, selective_scan

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
SHAPES = {"dt": "BTD", "B": "BTN", "C": "BTN"}
FORMS = {
    "mamba": {},
    "time_invariant": {"dt": "D", "B": "DN", "C": "DN"},
    "input_varies": {"dt": "D", "C": "DN"},
    "output_varies": {"B": "DN"},
}


def arguments(B=2, T=17, D=5, N=3, *, form="mamba", step=0.5, dtype=torch.float64, seed=0):
    """dt A lies between 0 and -step; every tensor asks for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"B": B, "T": T, "D": D, "N": N}
    shapes = {"x": "BTD", **SHAPES, "D": "D", "z": "BTD", "A": "DN", "initial_state": "BDN", **FORMS[form]}

    def draw(name):
        shape = [sizes[letter] for letter in shapes[name]]
        if name == "A":
            return -0.1 - 0.9 * torch.rand(shape, generator=generator, dtype=dtype)
        if name == "dt":
            return step * torch.rand(shape, generator=generator, dtype=dtype)
        return torch.randn(shape, generator=generator, dtype=dtype)

    order = ("x", "dt", "A", "B", "C", "D", "z", "initial_state")
    return {name: draw(name).requires_grad_() for name in order}


def gradients(impl, a, **options):
    y, h = selective_scan(**a, impl=impl, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, h, torch.autograd.grad((weights * y).sum() + h.square().sum(), list(a.values()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_equals_recurrence(form, T, monkeypatch):
    # Chunks of eight steps, as long sequences have them, so that every length here crosses a boundary.
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    a = arguments(T=T, form=form)
    y, h, gradient = gradients("chunked", a)
    y_ref, h_ref, gradient_ref = gradients("reference", a)
    torch.testing.assert_close(y, y_ref, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(h, h_ref, rtol=1e-11, atol=1e-11)
    for name, got, expected in zip(a, gradient, gradient_ref, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize(("B", "T", "D", "N"), [(1, 3, 1, 1), (3, 40, 7, 16), (2, 65, 33, 5)])
def test_odd_sizes_in_one_chunk_or_more(B, T, D, N):
    a = arguments(B, T, D, N)
    for got, expected in zip(gradients("chunked", a)[2], gradients("reference", a)[2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", [1e-6, 20.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays_stay_finite_and_right(step, dtype):
    a = arguments(T=65, step=step, dtype=dtype)
    with torch.no_grad():
        a["A"][0] = -1.0
        a["dt"][:, 20:] = step
    exact = {name: t.detach().double().requires_grad_() for name, t in a.items()}
    for got, expected in zip(gradients("chunked", a)[2], gradients("reference", exact)[2], strict=True):
        assert got.isfinite().all()
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            got.double(), expected, rtol=0, atol=scale * (2e-5 if dtype == torch.float32 else 1e-11)
        )


def test_constant_coefficients_have_a_closed_form():
    # h_t = b x (1 + r + ... + r^t) with r = exp(dt A): a geometric series.
    T, dt, A, b, c, x = 50, 0.3, -0.7, 1.3, -0.4, 2.0
    one = torch.ones(1, T, 1, dtype=torch.float64)
    y, h = selective_scan(x * one, dt * one, A * one[0, :1], b * one, c * one)
    r = torch.exp(torch.tensor(dt * A, dtype=torch.float64))
    expected = dt * b * x * (1 - r ** torch.arange(1, T + 1)) / (1 - r)
    torch.testing.assert_close(y.flatten(), c * expected)
    torch.testing.assert_close(h.flatten(), expected[-1:])


def test_skip_and_gate():
    a = arguments(T=20)
    y, h = selective_scan(**a)
    plain, h_plain = selective_scan(**{**a, "D": None, "z": None})
    torch.testing.assert_close(y, (plain + a["D"] * a["x"]) * F.silu(a["z"]))
    assert torch.equal(h, h_plain)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_bias_of_the_step(impl):
    a = arguments(T=20)
    bias = torch.linspace(-3, 3, 5, dtype=torch.float64, requires_grad=True)
    y, h = selective_scan(**a, dt_bias=bias, impl=impl)
    y_given, h_given = selective_scan(**{**a, "dt": torch.logaddexp(a["dt"] + bias, torch.zeros(()))}, impl=impl)
    torch.testing.assert_close(y, y_given)
    torch.testing.assert_close(h, h_given)
    got, expected = (torch.autograd.grad(out.square().sum(), [bias, a["dt"]]) for out in (y, y_given))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("form", FORMS)
def test_segments_equal_the_whole(impl, form):
    a = arguments(T=30, form=form)
    whole, last = selective_scan(**a, impl=impl)
    pieces, state, start = [], a["initial_state"], 0
    for length in (1, 2, 20, 7):
        cut = {n: t[:, start : start + length] if t.dim() == 3 and n != "initial_state" else t for n, t in a.items()}
        y, state = selective_scan(**{**cut, "initial_state": state}, impl=impl)
        pieces.append(y)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_no_state_given_means_zeros_and_none_asked_means_none():
    a = arguments(T=9)
    zeros = torch.zeros_like(a.pop("initial_state"))
    y, h = selective_scan(**a)
    assert h.shape == zeros.shape
    assert h.is_contiguous()
    assert torch.equal(y, selective_scan(**a, initial_state=zeros)[0])
    y_alone, nothing = selective_scan(**a, return_state=False)
    assert nothing is None
    assert torch.equal(y, y_alone)


def test_later_inputs_leave_earlier_outputs_alone():
    a = {name: t.detach() for name, t in arguments(T=40, dtype=torch.float32).items()}
    y, _ = selective_scan(**a)
    changed = {n: t.clone() for n, t in a.items()}
    for name in ("x", "dt", "B", "C", "z"):
        changed[name][:, 25:] = 3.0
    y_changed, _ = selective_scan(**changed)
    assert torch.equal(y[:, :25], y_changed[:, :25])
    assert not torch.equal(y[:, 25], y_changed[:, 25])


def test_the_state_given_is_left_as_it_was():
    a = {name: t.detach() for name, t in arguments(T=12).items()}
    before = a["initial_state"].clone()
    selective_scan(**a)
    assert torch.equal(a["initial_state"], before)


def test_bfloat16_is_summed_in_fp32():
    a = {name: t.detach().bfloat16() for name, t in arguments(T=60).items()}
    y, h = selective_scan(**a)
    y_exact, h_exact = selective_scan(**{name: t.double() for name, t in a.items()}, impl="reference")
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.double(), y_exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(h.double(), h_exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dt": torch.ones(2, 17, 4)},
            r"dt has shape \(2, 17, 4\); expected \(B, T, D\) = \(2, 17, 5\) or \(D,\) = \(5,\)",
        ),
        ({"B": torch.ones(2, 17, 4)}, r"B has shape .* \(2, 17, 3\) or \(D, N\) = \(5, 3\)"),
        ({"C": torch.ones(3, 5)}, "C has shape"),
        ({"A": torch.ones(4, 3)}, "A has shape"),
        ({"z": torch.ones(2, 16, 5)}, "z has shape"),
        ({"dt_bias": torch.ones(4)}, "dt_bias has shape"),
        ({"dt": torch.ones(5), "dt_bias": torch.ones(5)}, r"dt_bias needs a dt of shape \(B, T, D\)"),
        ({"initial_state": torch.ones(2, 3, 5)}, r"initial_state has shape \(2, 3, 5\); expected \(B, D, N\)"),
        ({"A": torch.ones(5, 0)}, "no axis may be empty"),
        ({"impl": "mystery"}, "no backend 'mystery'"),
    ],
)
def test_errors(change, message):
    with pytest.raises(UnsupportedError, match=message):
        selective_scan(**{**arguments(), **change})
