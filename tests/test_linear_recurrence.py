"""linear_recurrence: the CPU backend against the recurrence and public references; its state, gradients and errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from zoo.errors import UnsupportedError
from zoo.kernels.linear_recurrence import chunked, linear_recurrence
from zoo.state import named_tensors
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES, relative_error

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
DECAYS = {"none": None, "head": "H", "step": "BTH", "channel": "BTHK"}
SHAPES = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "bonus": "HK", "skip": "H", "initial_state": "BHKV"}
EXTREME = (0.0, -1e-6, -20.0)

reference = partial(linear_recurrence, impl="reference")
parallel = partial(linear_recurrence, impl="chunked")


def arguments(T=17, decay="channel", B=2, H=3, K=5, V=7, *, values=None, seed=0, dtype=torch.float64, without=()):
    """Standard normal tensors that ask for gradients; log decays drawn from `values`, or uniform in [-1, 0]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"B": B, "T": T, "H": H, "K": K, "V": V}
    shapes = {name: letters for name, letters in SHAPES.items() if name not in without}
    a = {
        name: torch.randn([sizes[i] for i in letters], generator=generator, dtype=torch.float64)
        for name, letters in shapes.items()
    }
    if DECAYS[decay]:
        shape = [sizes[i] for i in DECAYS[decay]]
        if values is None:
            a["decay"] = -torch.rand(shape, generator=generator, dtype=torch.float64)
        else:
            choice = torch.randint(len(values), shape, generator=generator)
            a["decay"] = torch.tensor(values, dtype=torch.float64)[choice]
    return {name: x.to(dtype).requires_grad_() for name, x in a.items()}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_equals_recurrence(T, decay):
    """Output, final state and every gradient, through both."""
    tolerance = TOLERANCES["two forms"][torch.float64]
    check_op(reference, parallel, arguments(T, decay), tolerance)
    plain = arguments(T, decay, values=EXTREME, seed=1, without=("bonus", "initial_state"))
    check_op(reference, parallel, plain, tolerance)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1, 2, 33), (1, 4, 17, 1)], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_odd_sizes(decay, sizes):
    check_op(reference, parallel, arguments(70, decay, *sizes), TOLERANCES["two forms"][torch.float64])


@pytest.mark.parametrize("values", [(0.0,), (-1e-6,), (-20.0,), (-20.0, -0.01), (-90.0, -1e-3), EXTREME], ids=str)
@pytest.mark.parametrize("decay", ["head", "step", "channel"])
def test_extreme_decays_cost_no_precision(decay, values):
    # 64 steps of -20 overflow fp32 as a ratio of cumulative decays, and as a difference of sums keep 4 digits.
    a = arguments(130, decay, values=values, dtype=torch.float32)
    check_op(reference, parallel, a, TOLERANCES["linear_recurrence"][torch.float32])


@pytest.mark.parametrize("T", [64, 130, 300])
def test_every_chunk_size_gives_the_same(T, monkeypatch):
    a = arguments(T)
    whole, S = parallel(**a)
    for C in (1, 8, 128):
        monkeypatch.setattr(chunked, "_chunk_size", lambda T, state, C=C: C)
        o, last = parallel(**a)
        torch.testing.assert_close(o, whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(last, S, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_segments_equal_the_whole(decay):
    a = arguments(40, decay)
    whole, last = parallel(**a)
    S, pieces, start = a["initial_state"], [], 0
    for length in (1, 2, 20, 17):
        cut = {n: a[n][:, start : start + length] for n in ("q", "k", "v")}
        if decay != "none":
            cut["decay"] = a["decay"] if decay == "head" else a["decay"][:, start : start + length]
        o, S = parallel(**cut, bonus=a["bonus"], skip=a["skip"], initial_state=S)
        pieces.append(o)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(S, last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_state_only_where_asked(impl):
    a = arguments(20)
    o, S = linear_recurrence(**a, impl=impl)
    alone, nothing = linear_recurrence(**a, impl=impl, return_state=False)
    assert nothing is None
    assert S.shape == (2, 3, 5, 7)
    torch.testing.assert_close(alone, o, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_dtypes(impl):
    """The output is as v; the state fp32, which 16-bit inputs are summed in too."""
    a = arguments(70, dtype=torch.bfloat16)
    o, S = linear_recurrence(**a, impl=impl)
    exact, S_exact = reference(**{n: x.double() for n, x in a.items()})
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(S, S_exact).max() < 1e-4
    assert relative_error(o, exact).max() < 0.05


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_does_not_reach_inside(impl):
    a = arguments(70, dtype=torch.float32)
    expected = dict(named_tensors(linear_recurrence(**a, impl=impl)))
    with torch.autocast("cpu", torch.bfloat16):
        got = dict(named_tensors(linear_recurrence(**a, impl=impl)))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_vmap_over_a_pack_of_models():
    """As packed training runs it: gradients under vmap are those of each model alone, and nothing warns."""
    packs = [arguments(70, decay, seed=seed) for decay in ("step", "channel") for seed in (0, 1)]
    for first, second in (packs[:2], packs[2:]):
        names = list(first)

        def loss(*tensors, names=names):
            o, S = parallel(**dict(zip(names, tensors, strict=True)))
            return o.square().sum() + S.square().sum()

        gradient = torch.func.grad(loss, argnums=tuple(range(len(names))))
        stacked = [torch.stack([first[n], second[n]]).detach() for n in names]
        together = torch.func.vmap(gradient)(*stacked)
        for i in range(2):
            for got, expected in zip(together, gradient(*(x[i] for x in stacked)), strict=True):
                torch.testing.assert_close(got[i], expected)


def fla_inputs(T=70, K=16, V=24):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, T, 3, d, generator=generator) for d in (K, K, V))
    g = torch.nn.functional.logsigmoid(torch.randn(2, T, 3, K, generator=generator))
    return q, k, v, g, torch.randn(2, 3, K, V, generator=generator)


def assert_parity(got, expected):
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_parity_gla():
    naive = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    q, k, v, g, S = fla_inputs()
    o, last = parallel(q / 4, k, v, g, initial_state=S)
    expected, expected_last = naive(q, k, v, g, initial_state=S, output_final_state=True)
    assert_parity(o, expected)
    assert_parity(last, expected_last)


def test_parity_simple_gla():
    """One decay for all channels: Mamba-2's recurrence."""
    naive = pytest.importorskip("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
    q, k, v, g, S = fla_inputs()
    o, last = parallel(q / 4, k, v, g[..., 0], initial_state=S)
    expected, expected_last = naive(q, k, v, g[..., 0], initial_state=S, output_final_state=True)
    assert_parity(o, expected)
    assert_parity(last, expected_last)


def test_parity_retention():
    naive = pytest.importorskip("fla.ops.retention.naive").naive_retention
    q, k, v, _, _ = fla_inputs()
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(3))))
    o, _ = parallel(q / 4, k, v, decay)
    assert_parity(o, naive(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2))


def test_parity_linear_attention():
    naive = pytest.importorskip("fla.ops.linear_attn.naive").naive_chunk_linear_attn
    q, k, v, _, _ = fla_inputs(T=128)
    o, _ = parallel(q / 4, k, v)
    assert_parity(o, naive(q, k, v))


def test_parity_rwkv6():
    naive = pytest.importorskip("fla.ops.rwkv6.recurrent_naive").naive_recurrent_rwkv6
    q, k, v, g, S = fla_inputs()
    u = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    o, last = parallel(q, k, v, g, bonus=u, initial_state=S)
    q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
    expected, expected_last = naive(q, k, v, g, u, scale=1.0, initial_state=S, output_final_state=True)
    assert_parity(o, expected.transpose(1, 2))
    assert_parity(last, expected_last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 17, 5)}, r"q has shape \(2, 17, 5\); expected \(B, T, H, K\)"),
        ({"k": (2, 17, 3, 6)}, r"k has shape \(2, 17, 3, 6\); expected \(B=2, T=17, H=3, K=5\)"),
        ({"v": (2, 16, 3, 7)}, r"v has shape \(2, 16, 3, 7\)"),
        ({"decay": (2, 17)}, r"decay has shape \(2, 17\)"),
        ({"decay": (5,)}, r"decay has shape \(5,\); expected \(H=3\)"),
        ({"bonus": (3, 7)}, r"bonus has shape \(3, 7\)"),
        ({"initial_state": (2, 3, 7, 5)}, r"initial_state has shape \(2, 3, 7, 5\)"),
        ({"v": (2, 17, 3, 0), "initial_state": (2, 3, 5, 0)}, "no axis may be empty"),
    ],
)
def test_bad_shapes_are_named(change, message):
    a = arguments() | {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(UnsupportedError, match=message):
        linear_recurrence(**a)


def test_unknown_backend():
    with pytest.raises(UnsupportedError, match="no backend 'fused'; choose one of"):
        linear_recurrence(**arguments(), impl="fused")
