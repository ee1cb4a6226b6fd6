from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from zoo.errors import UnsupportedError
from zoo.kernels.attention import causal_attention, chunked


def inputs(Tq, Tk=None, B=2, H=2, G=None, K=5, V=5, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(B, Tq, H, K), (B, Tk or Tq, G or H, K), (B, Tk or Tq, G or H, V)]
    return [torch.randn(*shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


def outputs_and_gradients(arguments, **options):
    o = causal_attention(*arguments, **options)
    slope = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape)
    return o, *torch.autograd.grad((o * slope).sum(), arguments)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, 100])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_chunked_is_the_reference(T, window, monkeypatch):
    # Small blocks, so that these lengths have many of them.
    monkeypatch.setattr(chunked, "MIN_BLOCK", 4)
    arguments = inputs(T)
    expected = outputs_and_gradients(arguments, window=window, impl="reference")
    torch.testing.assert_close(
        outputs_and_gradients(arguments, window=window, impl="chunked"), expected, rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("Tq", "Tk"), [(1, 9), (17, 17), (4, 11)])
def test_a_pack_of_attentions_is_one_call(Tq, Tk, window):
    """As it runs on a GPU; where FlashAttention does not apply, as here, the op computes the same in plain torch."""
    packs = [torch.stack(rows) for rows in zip(*(inputs(Tq, Tk, seed=seed) for seed in range(3)), strict=True)]
    packs = [pack.detach().requires_grad_() for pack in packs]
    flash = partial(causal_attention, window=window, impl="flash")
    o = torch.func.vmap(flash)(*packs)
    each = torch.stack([causal_attention(*rows, window=window, impl="reference") for rows in zip(*packs, strict=True)])
    torch.testing.assert_close(o, each, rtol=1e-9, atol=1e-11)
    gradients = (torch.autograd.grad(y.square().sum(), packs) for y in (o, each))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 8])
@pytest.mark.parametrize(("Tq", "Tk"), [(1, 9), (3, 5), (40, 41), (40, 47), (40, 60)])
def test_queries_at_the_end_of_more_keys_and_shared_key_heads(Tq, Tk, window, G, monkeypatch):
    monkeypatch.setattr(chunked, "MIN_BLOCK", 4)
    arguments = inputs(Tq, Tk, H=4, G=G, V=3)
    expected = outputs_and_gradients(arguments, window=window, scale=0.7, impl="reference")
    found = outputs_and_gradients(arguments, window=window, scale=0.7, impl="chunked")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_queries_at_positions_are_those_of_the_whole(window, impl):
    q, k, v = inputs(13, H=4, G=2, V=3)
    positions = torch.tensor([[12, 0, 5, 5], [1, 7, 3, 2]])
    at = positions[..., None, None].expand(-1, -1, *q.shape[2:])
    whole = causal_attention(q, k, v, window=window, impl="reference").gather(1, at[..., : v.shape[3]])
    slope = torch.linspace(-1, 1, whole.numel(), dtype=whole.dtype).reshape(whole.shape)
    expected = whole, *torch.autograd.grad((whole * slope).sum(), (q, k, v))
    o = causal_attention(q.gather(1, at), k, v, window=window, positions=positions, impl=impl)
    found = o, *torch.autograd.grad((o * slope).sum(), (q, k, v))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_blocks_of_the_real_size():
    arguments = inputs(64 * 5 + 3, B=1, H=1, dtype=torch.float32)
    expected = outputs_and_gradients(arguments, window=20, impl="reference")
    torch.testing.assert_close(outputs_and_gradients(arguments, window=20), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("window", [None, 3])
def test_each_query_sees_its_window_and_nothing_else(window, impl, monkeypatch):
    monkeypatch.setattr(chunked, "MIN_BLOCK", 2)
    T = 21
    q, k, v = (x.detach() for x in inputs(T, B=1, H=1, V=T))
    # One-hot values: the output is the row of attention weights.
    weights = causal_attention(q, k, torch.eye(T, dtype=v.dtype)[None, :, None], window=window, impl=impl)[0, :, 0]
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    if window:
        seen &= torch.ones(T, T, dtype=torch.bool).triu(1 - window)
    assert torch.equal(weights > 0, seen)
    torch.testing.assert_close(weights.sum(1), torch.ones(T, dtype=v.dtype))


def test_it_is_the_attention_of_torch_multihead_attention():
    torch.manual_seed(0)
    D, H, T = 24, 3, 19
    oracle = nn.MultiheadAttention(D, H, bias=False, batch_first=True)
    x = torch.randn(2, T, D)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected, _ = oracle(x, x, x, attn_mask=mask, need_weights=False)
    q, k, v = (x @ oracle.in_proj_weight.T).unflatten(-1, (3, H, D // H)).unbind(2)
    found = oracle.out_proj(causal_attention(q, k, v).flatten(2))
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_bf16_keeps_its_dtype_and_large_scores_are_finite(impl):
    q, k, v = (x.detach().bfloat16() for x in inputs(33, K=16, V=16))
    o = causal_attention(q, k, v, impl=impl)
    assert o.dtype == torch.bfloat16
    exact = causal_attention(q.double(), k.double(), v.double(), impl="reference")
    torch.testing.assert_close(o.double(), exact, rtol=2e-2, atol=2e-2)
    assert torch.isfinite(causal_attention(q * 1000, k * 1000, v, impl=impl)).all()


def test_what_does_not_fit_is_named():
    q, k, v = inputs(6, H=4)
    with pytest.raises(UnsupportedError, match=r"q has shape \(2, 6, 4, 5\)"):
        causal_attention(q, k[..., :4], v)
    with pytest.raises(UnsupportedError, match="6 queries but 5 keys"):
        causal_attention(q, k[:, :5], v[:, :5])
    with pytest.raises(UnsupportedError, match="4 query heads cannot share 3 key heads"):
        causal_attention(q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(UnsupportedError, match="window 0"):
        causal_attention(q, k, v, window=0)
    with pytest.raises(UnsupportedError, match="no backend 'fused'"):
        causal_attention(q, k, v, impl="fused")
