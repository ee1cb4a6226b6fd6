"""delta_net, gated_delta_net, rwkv7: parity with public code, the state, the initialisation."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.nn import functional as F

from zoo.errors import ConfigError
from zoo.mixers import LayerInfo
from zoo.mixers.delta_net import DeltaNet
from zoo.mixers.gated_delta_net import GatedDeltaNet
from zoo.mixers.rwkv7 import MIN_DECAY, RWKV7
from zoo.state import measure_state

D = 32
MIXERS = [DeltaNet, GatedDeltaNet, RWKV7]


def build(cls, *, d_model=D, index=0, depth=1, noise=0.1, **options):
    torch.manual_seed(0)
    if cls is RWKV7:
        options = {"head_dim": 16, **options}
    mixer = cls(cls.Config(**options), LayerInfo(d_model, index=index, depth=depth))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return mixer


def tokens(T=70, B=2, d_model=D):
    return torch.randn(B, T, d_model, generator=torch.Generator().manual_seed(1))


def assert_parity(got, expected):
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_delta_net_is_its_formula_around_the_naive_rule_of_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.delta_rule.naive")
    mixer, x = build(DeltaNet, num_heads=2, expand_v=0.5, allow_neg_eigval=True), tokens()
    channels = mixer.qkv(x).mT
    weight = mixer.conv_weight[:, None]
    qkv = F.silu(F.conv1d(F.pad(channels, (3, 0)), weight, groups=len(weight))).mT
    q, k, v = (y.unflatten(-1, (2, -1)) for y in qkv.split([D, D, D // 2], dim=-1))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = 2 * mixer.beta(x).sigmoid()
    o, S = naive.delta_rule_recurrence(*(y.transpose(1, 2) for y in (q, k, v, beta)))
    o = o.transpose(1, 2)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm_weight
    y, state = mixer.prefill(x)
    expected = mixer.out(o.flatten(2))
    # The authors' normalisation adds 1e-6 to |q|^2; torch's does not.
    assert (y - expected).norm() < 1e-4 * expected.norm()
    assert (state.S - S).norm() < 1e-4 * S.norm()


@pytest.mark.parametrize("T", [1, 33, 130])
def test_gated_delta_net_is_that_of_transformers_qwen3_next(T, monkeypatch):
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    # Where it can, transformers puts a GPU kernel in the place of its own code.
    plain = inspect.unwrap(qwen.torch_chunk_gated_delta_rule)
    monkeypatch.setattr(qwen, "torch_chunk_gated_delta_rule", plain)
    H, K, V = 2, D // 2, D
    config = qwen.Qwen3NextConfig(
        hidden_size=D,
        linear_num_value_heads=H,
        linear_num_key_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    mixer, oracle = build(GatedDeltaNet, num_heads=H), qwen.Qwen3NextGatedDeltaNet(config, 0)
    # The oracle's rows of q, k, v and z are interleaved head by head.
    q, k, v = mixer.qkv.weight.split([D, D, 2 * D])
    heads = [w.unflatten(0, (H, -1)) for w in (q, k, v, mixer.gate.weight)]
    oracle.load_state_dict(
        {
            "in_proj_qkvz.weight": torch.cat(heads, dim=1).flatten(0, 1),
            "in_proj_ba.weight": torch.stack([mixer.beta.weight, mixer.alpha.weight], dim=1).flatten(0, 1),
            "conv1d.weight": mixer.conv_weight[:, None],
            "A_log": mixer.A_log,
            "dt_bias": mixer.dt_bias,
            "norm.weight": mixer.norm_weight,
            "out_proj.weight": mixer.out.weight,
        }
    )
    x = tokens(T)
    assert_parity(mixer(x), oracle(x))


def test_rwkv7_is_the_paper_s_recurrence_step_by_step():
    mixer, x = build(RWKV7, noise=0.3), tokens(50)
    H, K = 2, 16
    S = torch.zeros(2, H, K, K)  # value by key, as in the paper
    previous = torch.zeros(2, D)
    expected = []
    for x_t in x.unbind(1):
        r, w, k, v, a, g = (x_t + (previous - x_t) * m for m in mixer.shifts)
        previous = x_t
        r, k, v = mixer.receptance(r), mixer.key(k), mixer.value(v)
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(mixer.decay + torch.tanh(w @ mixer.decay_down) @ mixer.decay_up))
        a = torch.sigmoid(mixer.rate + a @ mixer.rate_down @ mixer.rate_up)
        g = torch.sigmoid(g @ mixer.gate_down) @ mixer.gate_up
        kappa = (k * mixer.removal).view(2, H, K)
        kappa = kappa / kappa.norm(dim=-1, keepdim=True)
        k = k * (1 + (a - 1) * mixer.replacement)
        r, w, k, v, a = (y.view(2, H, K) for y in (r, w, k, v, a))
        transition = torch.diag_embed(w) - kappa[..., :, None] * (a * kappa)[..., None, :]
        S = S @ transition + v[..., :, None] * k[..., None, :]
        o = (S @ r[..., None])[..., 0]
        mean, variance = o.mean(-1, keepdim=True), o.var(-1, keepdim=True, correction=0)
        o = ((o - mean) / torch.sqrt(variance + 64e-5)).flatten(1) * mixer.norm.weight + mixer.norm.bias
        bonus = (r * k * mixer.bonus).sum(-1, keepdim=True) * v
        expected.append(mixer.output(g * (o + bonus.flatten(1))))
    y, state = mixer.prefill(x)
    assert_parity(y, torch.stack(expected, dim=1))
    assert_parity(state.S, S.mT)


@pytest.mark.parametrize(
    ("cls", "options", "elements"),
    [
        (DeltaNet, {"num_heads": 2}, 3 * (3 * D) + 2 * 16 * 16),
        (DeltaNet, {"num_heads": 4, "expand_k": 0.5, "conv_width": 2}, D // 2 + D // 2 + D + 4 * 4 * 8),
        (GatedDeltaNet, {"num_heads": 2}, 3 * (4 * D) + 2 * 16 * 32),
        (RWKV7, {"head_dim": 8}, D + 4 * 8 * 8),
    ],
)
def test_state_size(cls, options, elements):
    mixer = build(cls, **options)
    assert measure_state(mixer.init_state(3)).elements == elements
    assert measure_state(mixer.prefill(tokens(40))[1]).elements == elements


@pytest.mark.parametrize("cls", MIXERS)
def test_autocast_keeps_the_state_in_fp32(cls):
    mixer, x = build(cls), tokens()
    exact, exact_state = mixer.prefill(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer.prefill(x)
        (trained := mixer(x)).float().sum().backward()
    assert state.S.dtype == torch.float32
    for got, expected in ((y, exact), (trained, exact), (state.S, exact_state.S)):
        assert (got.float() - expected).norm() < 0.05 * expected.norm()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


def test_delta_net_recalls_the_last_value_of_a_key():
    """With an identity for W_qkv and beta near 1, writing v_2 under the key of v_1 leaves v_2 to be read."""
    mixer = build(DeltaNet, num_heads=1, noise=0)
    with torch.no_grad():
        mixer.qkv.weight.copy_(torch.eye(D).repeat(3, 1))
        mixer.conv_weight.zero_()
        mixer.conv_weight[:, -1] = 1
        mixer.beta.weight.fill_(1e3)
        mixer.out.weight.copy_(torch.eye(D))
    x = torch.rand(1, 6, D, generator=torch.Generator().manual_seed(0))
    y = mixer(x)
    # beta = 1: what is read with q = k is exactly v = silu(x), whatever was written before; then the norm.
    v = F.silu(x)
    torch.testing.assert_close(y, F.rms_norm(v * D**-0.5, (D,), eps=1e-5), rtol=1e-4, atol=1e-4)


def test_initial_decays_of_gated_delta_net():
    mixer = build(GatedDeltaNet, num_heads=32, noise=0)
    rate = mixer.A_log.exp()
    assert rate.min() >= 0.01
    assert rate.max() <= 16
    dt = F.softplus(mixer.dt_bias)
    assert 1e-3 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1
    torch.testing.assert_close(mixer.decay([torch.zeros(1, 1, 32)])[0, 0], -rate * dt)


def test_initialisation_of_rwkv7():
    first, last = (build(RWKV7, index=index, depth=4, noise=0) for index in (0, 3))
    x = tokens()
    assert not first(x).any()  # W_o is 0: a block starts as the identity
    assert first.norm.weight.unique().item() == pytest.approx(0.25**0.7)
    assert last.norm.weight.unique().item() == 1
    # Later layers look less at the previous token.
    assert (last.shifts[:, 1:] < first.shifts[:, 1:]).all()
    assert first.key.weight.abs().max() <= 0.05 * D**-0.5
    assert 0.4 * D**-0.5 < first.value.weight.abs().max() <= 0.5 * D**-0.5
    decays = MIN_DECAY * torch.sigmoid(first.decay)
    assert decays.min() < -0.5
    assert decays.max() > -0.01
    assert [first.decay_up.shape[0], first.gate_up.shape[0]] == [32, 32]
    wide = build(RWKV7, d_model=512, head_dim=64, noise=0)
    assert [wide.decay_up.shape[0], wide.rate_up.shape[0], wide.gate_up.shape[0]] == [64, 64, 128]


@pytest.mark.parametrize(
    ("cls", "exempt"),
    [
        (DeltaNet, set()),
        (GatedDeltaNet, {"A_log", "dt_bias"}),
        (
            RWKV7,
            {
                *("shifts", "removal", "replacement", "bonus", "decay", "decay_down", "decay_up"),
                *("rate", "rate_down", "rate_up", "gate_down", "gate_up"),
            },
        ),
    ],
)
def test_what_does_not_decay(cls, exempt):
    named = build(cls).named_parameters()
    assert {name for name, parameter in named if getattr(parameter, "_no_weight_decay", False)} == exempt


def test_what_does_not_fit_is_named():
    with pytest.raises(ConfigError, match=r"expand_k 0\.5 x d_model 32 = 16 is not divisible by num_heads 3"):
        build(DeltaNet, expand_k=0.5, num_heads=3)
    with pytest.raises(ConfigError, match=r"expand_v 2\.0 x d_model 32 = 64 is not divisible by num_heads 3"):
        build(GatedDeltaNet, expand_k=1.5, num_heads=3)
    with pytest.raises(ConfigError, match="rwkv7: d_model 32 is not divisible by head_dim 12"):
        build(RWKV7, head_dim=12)
