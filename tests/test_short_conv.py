"""short_conv: both backends against torch's conv1d, its state, its gradients and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import UnsupportedError
from zoo.kernels.short_conv import short_conv

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)


def arguments(B=2, T=17, D=5, W=4, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (B, T, D), "weight": (D, W), "bias": (D,), "initial_state": (B, W - 1, D)}
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for name, shape in shapes.items()
    }


def conv1d(x, weight, bias, activation, initial_state):
    """The same by torch's own grouped convolution."""
    y = F.conv1d(torch.cat([initial_state, x], 1).transpose(1, 2), weight[:, None], bias, groups=x.shape[2])
    return (F.silu(y) if activation else y).transpose(1, 2)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_conv1d(impl, T):
    for W in (1, 3, 4, 8):
        a = arguments(T=T, W=W)
        for activation in (None, "silu"):
            y, cache = short_conv(**a, activation=activation, impl=impl)
            torch.testing.assert_close(y, conv1d(**a, activation=activation), rtol=1e-12, atol=1e-12)
            past = torch.cat([a["initial_state"], a["x"]], 1)
            assert torch.equal(cache, past[:, T:])
            gated, _ = short_conv(**a, activation=activation, gate=a["x"] + 1, impl=impl)
            torch.testing.assert_close(gated, y * (a["x"] + 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 2, 3, 17, 65])
@pytest.mark.parametrize("W", [1, 4, 8])
def test_without_a_state_the_past_is_zero(T, W):
    a = arguments(T=T, W=W)
    zeros = torch.zeros_like(a.pop("initial_state"))
    y, cache = short_conv(**a)
    y_zeros, cache_zeros = short_conv(**a, initial_state=zeros)
    torch.testing.assert_close(y, y_zeros, rtol=1e-12, atol=1e-12)
    assert torch.equal(cache, cache_zeros)
    assert cache.untyped_storage().nbytes() == cache.numel() * cache.element_size()
    y_alone, nothing = short_conv(**a, return_state=False)
    assert nothing is None
    assert torch.equal(y_alone, y)


@pytest.mark.parametrize("T", [1, 2, 16, 65])
@pytest.mark.parametrize("W", [1, 4, 8])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_of_every_input_through_output_and_cache(T, W, activation):
    gradients = {}
    for impl in ("reference", "chunked"):
        a = arguments(T=T, W=W)
        y, cache = short_conv(**a, activation=activation, impl=impl)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + cache.square().sum()
        gradients[impl] = torch.autograd.grad(loss, list(a.values()))
    for name, expected, got in zip(a, *gradients.values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"d{name}: {m}")


def test_gradient_without_state_or_bias():
    a = arguments(T=6, W=4)
    assert torch.autograd.gradcheck(
        lambda x, weight: short_conv(x, weight, return_state=False)[0], (a["x"], a["weight"])
    )


def test_segments_equal_the_whole():
    a = arguments(T=20, W=4)
    whole, last = short_conv(**a, activation="silu")
    pieces, cache = [], a["initial_state"]
    for x in a["x"].split([1, 2, 1, 9, 7], dim=1):
        y, cache = short_conv(x, a["weight"], a["bias"], "silu", initial_state=cache)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(cache, last)


def test_later_inputs_leave_earlier_outputs_alone():
    a = arguments(T=33, dtype=torch.float32)
    changed = a["x"].detach().clone()
    changed[:, 20:] = 1e4
    y, _ = short_conv(**a)
    y_changed, _ = short_conv(**{**a, "x": changed})
    assert torch.equal(y[:, :20], y_changed[:, :20])
    assert not torch.equal(y[:, 20], y_changed[:, 20])


def test_bfloat16_is_summed_in_fp32():
    a = {name: t.detach().bfloat16() for name, t in arguments(T=40, W=8).items()}
    y, cache = short_conv(**a)
    assert y.dtype == cache.dtype == torch.bfloat16
    exact = conv1d(**{name: t.float() for name, t in a.items()}, activation=None)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_a_pack_of_models():
    a = arguments(T=9, W=4)
    weights = torch.stack([a["weight"], 2 * a["weight"], -a["weight"]]).detach()

    def loss(weight):
        return short_conv(a["x"].detach(), weight, return_state=False)[0].square().sum()

    packed = torch.func.vmap(torch.func.grad(loss))(weights)
    torch.testing.assert_close(packed, torch.stack([torch.func.grad(loss)(w) for w in weights]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 9)}, "9 taps"),
        ({"weight": torch.zeros(5, 0)}, "0 taps"),
        ({"weight": torch.zeros(4, 3)}, r"weight has shape \(4, 3\); expected \(D=5, W\)"),
        ({"bias": torch.zeros(6)}, "bias has shape"),
        ({"x": torch.zeros(2, 5)}, "x has shape"),
        ({"initial_state": torch.zeros(2, 4, 5)}, r"expected \(B, W-1, D\) = \(2, 3, 5\)"),
        ({"activation": "gelu"}, "'gelu'"),
        ({"x": torch.zeros(2, 0, 5)}, "no axis may be empty"),
        ({"impl": "cuda"}, "no backend 'cuda'"),
    ],
)
def test_errors(change, message):
    with pytest.raises(UnsupportedError, match=message):
        short_conv(**{**arguments(), **change})
