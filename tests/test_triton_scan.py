"""selective_scan in Triton, against its recurrence."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

from tests.triton_cases import EXTREME_DECAYS, LENGTHS, count_launches, inputs
from zoo.kernels.selective_scan import selective_scan
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

pytest.importorskip("triton")
fused_module = importlib.import_module("zoo.kernels.selective_scan.triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, which has no GPU")
FP32 = TOLERANCES["selective_scan"][torch.float32]
MAMBA = {"x": "BTD", "dt": "BTD", "A": "DN", "B": "BTN", "C": "BTN", "D": "D", "z": "BTD", "initial_state": "BDN"}
# A diagonal SSM whose parameters are the same at each token.
S4D = MAMBA | {"dt": "D", "B": "DN", "C": "DN"}
MIXED = MAMBA | {"B": "DN"}
# dt before its bias and softplus.
WITH_BIAS = MAMBA | {"dt_bias": "D"}

reference = partial(selective_scan, impl="reference")
fused = partial(selective_scan, impl="triton")


def arguments(T, shapes, D=9, N=3, batch=2, seed=0, decay=None, without=()):
    """dt in [.01, 1], A in [-2, -.1]; or both such that each step's log decay is `decay`."""
    shapes = {name: letters for name, letters in shapes.items() if name not in without}
    a = inputs(T, shapes, B=batch, D=D, N=N, seed=seed)
    with torch.no_grad():
        if "dt_bias" not in a:
            a["dt"].copy_(a["dt"].sigmoid() if decay is None else torch.full_like(a["dt"], 0.5))
        a["A"].copy_(-2 * a["A"].sigmoid() if decay is None else torch.full_like(a["A"], 2 * decay))
    return a


@pytest.mark.parametrize("T", LENGTHS)
def test_outputs_states_and_gradients(T):
    check_op(reference, fused, arguments(T, MAMBA, batch=1), FP32)


@pytest.mark.parametrize("T", [1, 10])
@pytest.mark.parametrize("shapes", [S4D, MIXED], ids=["s4d", "mixed"])
def test_time_invariant_parameters(shapes, T):
    check_op(reference, fused, arguments(T, shapes), FP32)
    check_op(reference, fused, arguments(T, shapes, without=("D", "z", "initial_state")), FP32)


@pytest.mark.parametrize("T", [1, 6])
def test_bias_of_the_step(T):
    a = arguments(T, WITH_BIAS)
    with torch.no_grad():
        # Steps down to 1e-6, where 1 + e^u is no longer exact, and up.
        a["dt_bias"].copy_(torch.linspace(-14, 30, 9))
    check_op(reference, fused, a, FP32)


@pytest.mark.parametrize(("D", "N"), [(1, 1), (33, 17), (3, 2)])
def test_odd_sizes(D, N):
    check_op(reference, fused, arguments(10, MAMBA, D, N, batch=1, without=("z",)), FP32)


@pytest.mark.parametrize("decay", EXTREME_DECAYS)
def test_extreme_decays(decay):
    check_op(reference, fused, arguments(12, MAMBA, batch=1, decay=decay), FP32)


def test_strided_inputs():
    a = arguments(10, MAMBA, batch=1)
    wide = torch.randn(1, 10, 30, generator=torch.Generator().manual_seed(2))
    a |= {name: wide[..., i : i + 3].requires_grad_() for name, i in (("B", 1), ("C", 5))}
    a |= {name: wide[..., i : i + 9].requires_grad_() for name, i in (("x", 3), ("z", 12))}
    check_op(reference, fused, a, FP32)


@pytest.mark.parametrize("without", [(), ("D", "z", "initial_state")], ids=["all", "bare"])
def test_a_sound_custom_op(without):
    a = arguments(2, MAMBA, D=3, N=2, without=without)
    a |= {name: a[name][None].detach().requires_grad_() for name in ("A", "D") if name in a}
    tensors = [a.get(name) for name in [*MAMBA][:-1]]
    bias = torch.zeros(1, 3, requires_grad=True) if not without else None
    first = a.get("initial_state")
    torch.library.opcheck(fused_module._forward, (*tensors, bias, first, [True] * 3, not without, True))


@pytest.mark.parametrize("shapes", [WITH_BIAS, S4D], ids=["mamba", "s4d"])
@pytest.mark.parametrize("T", [10, 12])
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_steps_after_all_that_the_loss_depends_on(T, shapes):
    a = arguments(T, shapes, batch=3)
    weight = torch.ones(3, T, 1)
    weight[1, 3:] = weight[2] = 0.0

    def gradients(op, weight):
        return torch.autograd.grad((op(**a, return_state=False)[0] * weight).square().sum(), [*a.values()])

    for got, want in zip(gradients(fused, weight), gradients(reference, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=FP32, atol=FP32)
    weight[1, -1] = torch.nan
    assert gradients(fused, weight)[0][1].isnan().all(-1).any()


@pytest.mark.parametrize("shapes", [WITH_BIAS, S4D], ids=["mamba", "s4d"])
def test_vmap_over_a_pack_of_models(shapes, monkeypatch):
    launches = count_launches(monkeypatch, fused_module)
    names = [name for name in shapes if name != "initial_state"]

    def run(*tensors):
        return fused(**dict(zip(names, tensors, strict=True)))

    def gradients(y, h, tensors):
        return torch.autograd.grad(y.square().sum() + h.square().sum(), tensors)

    packs = [arguments(3, shapes, D=3, N=2, seed=seed) for seed in (0, 1)]
    stacked = [torch.stack([pack[n] for pack in packs]).detach().requires_grad_() for n in names]
    together = gradients(*torch.func.vmap(run)(*stacked), stacked)
    assert launches == {"forward_kernel": 1, "backward_kernel": 1, "sum_kernel": 1}
    for i, pack in enumerate(packs):
        alone = [pack[n] for n in names]
        for got, want in zip(together, gradients(*run(*alone), alone), strict=True):
            torch.testing.assert_close(got[i], want)


def test_nothing_is_kept_without_gradients():
    a = arguments(20, MAMBA)
    y, h = fused(**a)
    with torch.no_grad():
        alone, last = fused(**a)
    assert torch.equal(alone, y)
    assert torch.equal(last, h)
