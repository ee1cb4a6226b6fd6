"""Attention to few keys in Triton, against its definition."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

from tests.triton_cases import count_launches
from zoo.errors import UnsupportedError
from zoo.kernels.attention import causal_attention
from zoo.kernels.launch import Config, forced
from zoo.testing.ops import check_op
from zoo.testing.tolerances import TOLERANCES

pytest.importorskip("triton")
fused_module = importlib.import_module("zoo.kernels.attention.triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, which has no GPU")
FP32 = TOLERANCES["attention"][torch.float32]


@pytest.fixture(autouse=True)
def small_blocks():
    """So that few tokens have many of them."""
    config = Config(chunk=1, block=16, num_warps=4, num_stages=1)
    with forced("attention.forward", config), forced("attention.query", config), forced("attention.key", config):
        yield


def arguments(T, B=1, H=2, K=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(B, T, H, K, generator=draw).requires_grad_() for name in "qkv"}


def op(impl, **options):
    return lambda q, k, v: causal_attention(q, k, v, impl=impl, **options)


@pytest.mark.parametrize("window", [None, 2, 17])
@pytest.mark.parametrize("T", [2, 16, 50])
def test_outputs_and_gradients(T, window):
    check_op(op("reference", window=window), op("triton", window=window), arguments(T), FP32)


def test_a_query_that_sees_itself_alone():
    q, k, v = arguments(18).values()
    torch.testing.assert_close(op("triton", window=1)(q, k, v), v)


@pytest.mark.parametrize("K", [1, 33])
def test_head_sizes_and_scale(K):
    check_op(op("reference", scale=0.7), op("triton", scale=0.7), arguments(20, K=K), FP32)


def test_strided_heads():
    """As slices of one projection."""
    x = torch.randn(1, 20, 2, 15, requires_grad=True)

    def attend(x, impl):
        return causal_attention(*x.split(5, dim=-1), window=9, impl=impl)

    check_op(partial(attend, impl="reference"), partial(attend, impl="triton"), {"x": x}, FP32)


def test_scores_of_a_thousand_do_not_overflow():
    a = {name: (30 * x).detach().requires_grad_() for name, x in arguments(20).items()}
    o = op("triton")(**a)
    assert torch.isfinite(o).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(o.sum(), list(a.values())))


def test_a_sound_custom_op():
    torch.library.opcheck(fused_module._forward, (*arguments(5).values(), 4, 0.5))


def test_vmap_over_a_pack_of_models(monkeypatch):
    launches = count_launches(monkeypatch, fused_module.kernels)
    packs = [arguments(18, seed=seed) for seed in range(2)]
    stacked = [torch.stack([pack[name] for pack in packs]).detach().requires_grad_() for name in "qkv"]
    attend = op("triton", window=7)
    together = torch.autograd.grad(torch.func.vmap(attend)(*stacked).square().sum(), stacked)
    assert launches == {"forward_kernel": 1, "query_kernel": 1, "key_kernel": 1}
    for i, pack in enumerate(packs):
        for got, want in zip(together, torch.autograd.grad(attend(**pack).square().sum(), pack.values()), strict=True):
            torch.testing.assert_close(got[i], want)


def test_what_it_does_not_take():
    q, k, v = arguments(4).values()
    with pytest.raises(UnsupportedError, match=r"one shape.*impl='flash'"):
        causal_attention(q[:, 2:], k, v, impl="triton")
    with pytest.raises(UnsupportedError, match="the triton backend takes no positions"):
        causal_attention(q, k, v, positions=torch.zeros(1, 4, dtype=torch.int64), impl="triton")
