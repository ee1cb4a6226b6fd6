"""taylor_attention in Triton: all pairs, and states between chunks of them, against the recurrence in torch."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from tests.triton_cases import inputs
from zoo.kernels.launch import Config, forced
from zoo.kernels.taylor_attention import TaylorState, taylor_attention
from zoo.kernels.taylor_attention.features import taylor_features
from zoo.state import map_tensors
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

pytest.importorskip("triton")
fused_module = importlib.import_module("zoo.kernels.taylor_attention.triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, which has no GPU")
FP32 = TOLERANCES["taylor_attention"][torch.float32]
SHAPES = {"q": "BTHK", "k": "BTHK", "v": "BTHV"}

reference = partial(taylor_attention, impl="reference")
fused = partial(taylor_attention, impl="triton")
stateless = {"return_state": False}


def arguments(T, K=3, V=5, B=1, H=2, *, state=True, seed=0):
    a = inputs(T, SHAPES, B=B, H=H, K=K, V=V, seed=seed)
    if state:
        earlier = inputs(4, {"k": "BHTK", "v": "BHTV"}, B=B, H=H, K=K, V=V, seed=seed + 1)
        phi = taylor_features(earlier["k"].detach())
        sums = phi.mT @ earlier["v"].detach(), phi.sum(2)
        a["initial_state"] = TaylorState(*(x.requires_grad_() for x in sums))
    return a


@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 65])
def test_all_pairs(T):
    # The first token's weights sum to 1: without eps its q and k have gradients of 0.
    options = stateless | {"eps": 0.5}
    check_op(partial(reference, **options), partial(fused, **options), arguments(T, state=False), FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_pairs_in_other_chunks(dtype):
    """In half precision too, where sums over the diagonal are split."""
    config = Config(16, 16, 1, 1)
    a = arguments(70, K=17, V=33, H=1, state=False)
    with ExitStack() as stack:
        for kernel in ("forward", "query_backward", "key_backward"):
            stack.enter_context(forced(f"taylor_attention.{kernel}", config))
        a = {n: x.detach().to(dtype).requires_grad_() for n, x in a.items()}
        tolerance = TOLERANCES["taylor_attention"][dtype]
        check_op(partial(reference, **stateless), partial(fused, **stateless), a, tolerance)


@pytest.mark.parametrize(("T", "K"), [(1, 3), (17, 1), (33, 4)])
def test_a_state(T, K):
    """Output, both parts of the final state and every gradient, with and without an initial state."""
    check_op(reference, fused, arguments(T, K), FP32)
    options = {"eps": 0.5}
    check_op(partial(reference, **options), partial(fused, **options), arguments(T, K, state=False, seed=2), FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("state", [False, True])
def test_chunks(state, dtype, monkeypatch):
    """Three chunks, the last one short; the state's channels are not a power of 2, nor are its rows full."""
    monkeypatch.setattr(fused_module, "chunk_length", lambda T, K: 32)
    options = {"return_state": state, "eps": 0.5}
    a = arguments(70, K=5, V=17, H=1, state=state)
    a = {n: map_tensors(lambda x: x.detach().to(dtype).requires_grad_(), x) for n, x in a.items()}
    with ExitStack() as stack:
        for kernel in ("forward", "query_backward", "key_backward", "sums"):
            stack.enter_context(forced(f"taylor_attention.{kernel}", Config(16, 16, 1, 1)))
        tolerance = TOLERANCES["taylor_attention"][dtype]
        check_op(partial(reference, **options), partial(fused, **options), a, tolerance)


@pytest.mark.parametrize(("width", "unit"), [(24, 4), (22, 2), (19, 1)])
def test_rows_next_to_each_other(width, unit):
    """As a projection leaves them: of what divides their strides, no more than that is taken for granted."""
    x = torch.randn(2, 20, width, generator=torch.Generator().manual_seed(0)).half()
    a = {
        n: y.unflatten(-1, (1, -1)).requires_grad_()
        for n, y in zip("qkv", x[..., :16].split([4, 4, 8], -1), strict=True)
    }
    assert fused_module.unit(*a.values()) == unit
    check_op(
        partial(reference, **stateless), partial(fused, **stateless), a, TOLERANCES["taylor_attention"][torch.float16]
    )


def test_what_strides_have_in_common():
    x = torch.zeros(2, 16, 3, 16, dtype=torch.half)
    assert fused_module.unit(x) == 1, "Triton sees multiples of 16 by itself"
    assert fused_module.unit(x, x[..., :8].contiguous()) == 8
    assert fused_module.unit(x.float()[..., :8].contiguous()) == 4
    assert fused_module.unit(x[..., :6].contiguous()) == 2


def test_long_sequences_are_cut_into_chunks_and_short_ones_are_not():
    for K in (8, 16, 24, 32):
        assert fused_module.chunk_length(1024, K) == 1024
        assert fused_module.chunk_length(65536, K) <= 512
    assert fused_module.chunk_length(2000, 24) == 2048
    assert fused_module.chunk_length(4096, 32) == 4096
    for T, K in ((2048, 8), (2048, 16), (4096, 24), (8192, 32)):
        assert fused_module.chunk_length(T, K) < T
