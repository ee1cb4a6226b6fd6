"""taylor_attention: the features, the CPU backend against the recurrence, a public reference, its state, its errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from zoo.errors import UnsupportedError
from zoo.kernels.taylor_attention import TaylorState, taylor_attention
from zoo.kernels.taylor_attention.features import num_features, taylor_features
from zoo.state import named_tensors
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES, relative_error

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)

reference = partial(taylor_attention, impl="reference")
parallel = partial(taylor_attention, impl="chunked")


def arguments(T=17, K=4, B=2, H=3, V=7, *, state=True, dtype=torch.float64, seed=0):
    """Standard normal tensors that ask for gradients; the state that of five earlier tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a = {"q": draw(B, T, H, K), "k": draw(B, T, H, K), "v": draw(B, T, H, V)}
    a = {name: x.to(dtype).requires_grad_() for name, x in a.items()}
    if state:
        phi = taylor_features(draw(B, H, 5, K))
        sums = phi.mT @ draw(B, H, 5, V), phi.sum(2)
        dtype = torch.promote_types(dtype, torch.float32)
        a["initial_state"] = TaylorState(*(x.to(dtype).requires_grad_() for x in sums))
    return a


@pytest.mark.parametrize("K", [1, 2, 16, 24])
def test_features_multiply_to_the_polynomial(K):
    q, k = torch.randn(2, 9, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi = taylor_features(q)
    assert phi.shape == (9, num_features(K)) == (9, 1 + K + K * (K + 1) // 2)
    s = (q * k).sum(-1) / K**0.5
    torch.testing.assert_close((phi * taylor_features(k)).sum(-1), 1 + s + s**2 / 2, rtol=1e-12, atol=1e-12)


def test_features_are_in_the_order_that_is_documented():
    x = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    y = x / 3**0.25
    half = 0.5**0.5
    expected = [1, y[0], y[1], y[2]]
    expected += [y[0] * y[0] * half, y[0] * y[1], y[0] * y[2], y[1] * y[1] * half, y[1] * y[2], y[2] * y[2] * half]
    torch.testing.assert_close(taylor_features(x), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("K", [1, 3, 6])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_equals_recurrence(T, K):
    """Output, both parts of the final state and every gradient; K = 1 and 3 run in chunks from T = 13 and 41 on."""
    tolerance = TOLERANCES["two forms"][torch.float64]
    check_op(reference, parallel, arguments(T, K), tolerance)
    check_op(reference, parallel, arguments(T, K, state=False, seed=1), tolerance)


@pytest.mark.parametrize(("T", "K"), [(40, 8), (200, 3)])
def test_fp32(T, K):
    a = arguments(T, K, dtype=torch.float32)
    check_op(reference, parallel, a, TOLERANCES["taylor_attention"][torch.float32])


@pytest.mark.parametrize("lengths", [(1, 2, 20, 17), (150, 1, 129)], ids=str)
def test_segments_equal_the_whole(lengths):
    a = arguments(sum(lengths), K=3)
    whole, last = parallel(**a)
    state, pieces, start = a["initial_state"], [], 0
    for length in lengths:
        cut = {n: a[n][:, start : start + length] for n in ("q", "k", "v")}
        o, state = parallel(**cut, initial_state=state)
        pieces.append(o)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-11)
    for got, expected in zip(state, last, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_state_only_where_asked(impl):
    a = arguments(20)
    o, state = taylor_attention(**a, impl=impl)
    alone, nothing = taylor_attention(**a, impl=impl, return_state=False)
    assert nothing is None
    assert [tuple(x.shape) for x in state] == [(2, 3, 15, 7), (2, 3, 15)]
    torch.testing.assert_close(alone, o, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_dtypes(impl):
    """The output is as v; the state fp32, which 16-bit inputs are summed in too."""
    a = arguments(70, dtype=torch.bfloat16)
    o, state = taylor_attention(**a, impl=impl)
    double = {n: x.double() for n, x in a.items() if n != "initial_state"}
    exact, exact_state = reference(**double, initial_state=TaylorState(*(x.double() for x in a["initial_state"])))
    assert (o.dtype, state.S.dtype, state.z.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert relative_error(state.S, exact_state.S).max() < 1e-4
    assert relative_error(o, exact).max() < 0.05


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_does_not_reach_inside(impl):
    a = arguments(70, dtype=torch.float32)
    expected = dict(named_tensors(taylor_attention(**a, impl=impl)))
    with torch.autocast("cpu", torch.bfloat16):
        got = dict(named_tensors(taylor_attention(**a, impl=impl)))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("T", [20, 130])
def test_vmap_over_a_pack_of_models(T):
    def loss(q, k, v):
        o, state = parallel(q, k, v)
        return o.square().sum() + state.S.square().sum() + state.z.square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    packs = [arguments(T, K=2, state=False, seed=seed) for seed in (0, 1)]
    stacked = [torch.stack([pack[n] for pack in packs]).detach() for n in ("q", "k", "v")]
    together = torch.func.vmap(gradient)(*stacked)
    for i in range(2):
        for got, expected in zip(together, gradient(*(x[i] for x in stacked)), strict=True):
            torch.testing.assert_close(got[i], expected)


@pytest.mark.parametrize("K", [3, 16])
def test_parity_with_a_public_reference(K):
    naive = pytest.importorskip("fla.ops.based.naive").naive_parallel_based
    a = arguments(200, K, state=False, dtype=torch.float32)
    o, _ = parallel(**a)
    expected = naive(*(a[n].transpose(1, 2) for n in ("q", "k", "v"))).transpose(1, 2)
    assert (o - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 17, 4)}, r"q has shape \(2, 17, 4\); expected \(B, T, H, K\)"),
        ({"k": torch.zeros(2, 17, 3, 5)}, r"k has shape \(2, 17, 3, 5\)"),
        ({"v": torch.zeros(2, 16, 3, 7)}, r"v has shape \(2, 16, 3, 7\)"),
        ({"v": torch.zeros(2, 17, 3, 0), "initial_state": None}, "no axis may be empty"),
        (
            {"initial_state": TaylorState(torch.zeros(2, 3, 21, 7), torch.zeros(2, 3, 21))},
            "has 21 features; K=4 makes 15",
        ),
        (
            {"initial_state": TaylorState(torch.zeros(2, 3, 15, 7), torch.zeros(2, 3, 15, 1))},
            r"z has shape \(2, 3, 15, 1\)",
        ),
    ],
)
def test_bad_shapes_are_named(change, message):
    with pytest.raises(UnsupportedError, match=message):
        taylor_attention(**(arguments() | change))


def test_unknown_backend():
    with pytest.raises(UnsupportedError, match="no backend 'fused'; choose one of"):
        taylor_attention(**arguments(), impl="fused")
