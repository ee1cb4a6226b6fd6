"""wkv: the CPU backend against the recurrence, the definition, its state, its gradients and its errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_cases import LENGTHS, inputs

from zoo.errors import UnsupportedError
from zoo.kernels.wkv import WKVState, chunked, empty_state, wkv
from zoo.state import map_tensors
from zoo.testing.ops import check_op, op_errors, run_op
from zoo.testing.tolerances import TOLERANCES

FP32 = TOLERANCES["wkv"][torch.float32]
SHAPES = {"k": "BTD", "v": "BTD", "decay": "D", "bonus": "D"}
STATE = {"numerator": "BD", "denominator": "BD", "largest": "BD"}
reference, fast = (partial(wkv, impl=impl) for impl in ("reference", "chunked"))


def arguments(T, B=2, D=5, *, seed=0, decay=None, keys=1.0, state=True):
    """Decays from e^-.02 to e^-20 a step, or all of them `decay`; keys of a size."""
    a = inputs(T, SHAPES | (STATE if state else {}), seed=seed, B=B, D=D)
    with torch.no_grad():
        a["k"].mul_(keys)
        a["decay"].copy_(-(2 * a["decay"]).exp() if decay is None else torch.full((D,), decay))
    if state:
        with torch.no_grad():
            a["denominator"].exp_()
        a["initial_state"] = WKVState(*(a.pop(name) for name in STATE))
    return a


def detached(a):
    return {name: map_tensors(torch.Tensor.detach, x) for name, x in a.items()}


def from_the_definition(k, v, decay, bonus):
    """Of no tokens before, in fp64, as the softmax that it is."""
    T = k.shape[1]
    k, v, g, u = (x.detach().double() for x in (k, v, decay, bonus))
    distance = torch.arange(T)[:, None] - torch.arange(T) - 1
    exponents = k[:, None] + distance.clamp(min=0)[..., None] * g
    exponents = torch.where((distance == -1)[..., None], k[:, None] + u, exponents)
    weights = exponents.masked_fill((distance < -1)[..., None], -torch.inf).softmax(2)
    return torch.einsum("btid,bid->btd", weights, v)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("keys", [1.0, 50.0])
def test_is_its_definition(impl, keys):
    a = arguments(40, keys=keys, state=False)
    o, _ = wkv(**a, impl=impl)
    torch.testing.assert_close(o.double(), from_the_definition(**a), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("T", [2, *LENGTHS])
def test_chunked_equals_recurrence(T, state, monkeypatch):
    # Chunks of eight steps, as long sequences have them, so that every length here crosses a boundary.
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    check_op(reference, fast, arguments(T, state=state), FP32)


def test_one_chunk_equals_recurrence():
    check_op(reference, fast, arguments(70, 3, 33), FP32)


@pytest.mark.parametrize("decay", [0.0, -1e-8, -1e-3, -20.0])
@pytest.mark.parametrize("keys", [1.0, 50.0])
def test_extremes_stay_finite_and_right(decay, keys):
    a = arguments(130, decay=decay, keys=keys)
    check_op(reference, fast, detached(a), 2 * FP32)
    errors = op_errors(reference, fast, a)
    # Between keys of a hundred apart the smaller gradients are less than what is lost to rounding in the larger.
    assert max(errors[name] for name in ("dk", "dv", "dbonus")) < (1e-4 if keys > 1 else FP32)
    assert all(x.isfinite().all() for x in run_op(fast, a, 0).values())


@pytest.mark.parametrize("size", [-50.0, 50.0])
def test_keys_of_one_size_average_alike(size):
    a = detached(arguments(30, state=False))
    o, state = wkv(**a | {"k": torch.full_like(a["k"], size)})
    same, at_zero = wkv(**a | {"k": torch.zeros_like(a["k"])})
    torch.testing.assert_close(o, same, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.largest, at_zero.largest + size)
    torch.testing.assert_close(state.numerator, at_zero.numerator, rtol=1e-5, atol=1e-6)


def test_a_slow_decay_is_not_lost_beside_a_large_key():
    """In fp32 50 - 1.5e-6 is 50, and 5,000 such steps are a factor of .9925 all the same."""
    a = {"k": torch.full((1, 5_000, 1), -50.0), "v": torch.zeros(1, 5_000, 1)}
    a["k"][:, 0] = 50.0
    for impl in ("reference", "chunked"):
        state = wkv(**a, decay=torch.tensor([-1.5e-6]), bonus=torch.zeros(1), impl=impl)[1]
        total = state.denominator.double().log() + state.largest
        # Each factor is rounded to a multiple of 6e-8.
        assert total.item() == pytest.approx(50 - 4_999 * 1.5e-6, abs=3e-8 * 5_000 + 4e-6)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_segments_equal_the_whole(impl):
    a = arguments(30)
    whole, last = wkv(**a, impl=impl)
    pieces, state, start = [], a["initial_state"], 0
    for length in (1, 2, 20, 7):
        cut = {name: a[name][:, start : start + length] for name in ("k", "v")}
        o, state = wkv(**a | cut | {"initial_state": state}, impl=impl)
        pieces.append(o)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
    for got, want in zip(state, last, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_both_forms_keep_the_same_state():
    """Its largest exponent is that of a token, so that the sum of weights is at least 1."""
    a = arguments(60, state=False)
    state, steps = wkv(**a)[1], wkv(**a, impl="reference")[1]
    for got, want in zip(state, steps, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    ages = torch.arange(59, -1, -1)[:, None]
    torch.testing.assert_close(state.largest, (a["k"] + ages * a["decay"]).amax(1))
    assert (state.denominator >= 1 - 1e-6).all()


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_no_state_given_is_the_empty_one_and_none_asked_is_none(impl):
    if impl == "triton":
        pytest.importorskip("triton")
    a = detached(arguments(9, state=False))
    o, state = wkv(**a, impl=impl)
    from_empty, same = wkv(**a, initial_state=empty_state(a["v"], 2), impl=impl)
    assert all(torch.equal(x, y) for x, y in zip((o, *state), (from_empty, *same), strict=True))
    alone, nothing = wkv(**a, return_state=False, impl=impl)
    assert nothing is None
    assert torch.equal(o, alone)
    # The first token is all there is.
    torch.testing.assert_close(o[:, 0], a["v"][:, 0])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_later_inputs_leave_earlier_outputs_alone(impl):
    a = detached(arguments(40))
    o, _ = wkv(**a, impl=impl)
    later = {name: torch.cat([a[name][:, :25], 50 + a[name][:, 25:]], 1) for name in ("k", "v")}
    changed, _ = wkv(**a | later, impl=impl)
    assert torch.equal(o[:, :25], changed[:, :25])
    assert not torch.equal(o[:, 25], changed[:, 25])


def test_bfloat16_is_summed_in_fp32():
    a = {name: map_tensors(lambda x: x.bfloat16(), x) for name, x in detached(arguments(60)).items()}
    o, state = wkv(**a)
    exact, state_exact = wkv(**{name: map_tensors(torch.Tensor.double, x) for name, x in a.items()}, impl="reference")
    assert (o.dtype, *(x.dtype for x in state)) == (torch.bfloat16, *[torch.float32] * 3)
    torch.testing.assert_close(o.double(), exact, rtol=2**-8, atol=1e-5)
    for got, want in zip(state, state_exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_pack_of_models():
    packs = [arguments(20, seed=seed, state=False) for seed in (0, 1, 2)]
    stacked = [torch.stack([pack[name] for pack in packs]).detach().requires_grad_() for name in SHAPES]

    def gradients(o, state, tensors):
        return torch.autograd.grad(o.square().sum() + sum(x.square().sum() for x in state), tensors)

    together = gradients(*torch.func.vmap(lambda *x: fast(*x))(*stacked), stacked)
    for i, pack in enumerate(packs):
        alone = gradients(*fast(**pack), list(pack.values()))
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.ones(2, 9, 4)}, r"v has shape \(2, 9, 4\); expected \(B=2, T=9, D=5\)"),
        ({"decay": torch.ones(2, 9, 5)}, r"decay has shape \(2, 9, 5\); expected \(D=5\)"),
        ({"initial_state": WKVState(*torch.ones(3, 2, 4))}, r"numerator has shape \(2, 4\); expected \(B=2, D=5\)"),
        ({"k": torch.ones(2, 0, 5), "v": torch.ones(2, 0, 5)}, "no axis may be empty"),
        ({"impl": "mystery"}, "no backend 'mystery'"),
    ],
)
def test_errors(change, message):
    with pytest.raises(UnsupportedError, match=message):
        wkv(**{**arguments(9), **change})
