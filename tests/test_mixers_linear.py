"""linear_attention, based, retnet, gla, mamba2, rwkv4, rwkv6: parity with public code, states, the initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import ConfigError
from zoo.mixers import LayerInfo
from zoo.mixers.based import Based
from zoo.mixers.feature_maps import FEATURE_MAPS
from zoo.mixers.gla import GLA
from zoo.mixers.linear_attention import LinearAttention
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.retnet import RetNet
from zoo.mixers.rwkv4 import RWKV4
from zoo.mixers.rwkv6 import RWKV6, RWKV6State
from zoo.state import measure_state
from zoo.testing.tolerances import TOLERANCES, relative_error

D = 32


def build(cls, *, d_model=D, seed=0, index=0, depth=1, noise=0.0, **options):
    torch.manual_seed(seed)
    mixer = cls(cls.Config(**options), LayerInfo(d_model, index=index, depth=depth))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return mixer


def tokens(T=70, B=2, d_model=D):
    return torch.randn(B, T, d_model, generator=torch.Generator().manual_seed(1))


def assert_parity(got, expected):
    assert (got - expected).norm() < 1e-5 * expected.norm()


CASES = [
    (LinearAttention, {"num_heads": 2}),
    (LinearAttention, {"num_heads": 4, "feature_map": "hedgehog", "feature_dim": 3}),
    (Based, {"num_heads": 2, "feature_dim": 2}),
    (RetNet, {"num_heads": 2}),
    (GLA, {"num_heads": 2, "gate_rank": 3}),
    (Mamba2, {"d_state": 3, "head_dim": 16, "num_groups": 4, "conv_width": 8}),
    (RWKV4, {}),
    (RWKV6, {"head_dim": 4, "mix_rank": 2, "decay_rank": 3}),
]


@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_forms_agree_in_fp64(cls, options):
    """forward = scan of step = prefill in segments that cross chunks, from one token on."""
    mixer, x = build(cls, noise=0.1, **options).double(), tokens(140, 1).double()
    whole = mixer(x)
    y, state = mixer.prefill(x[:, :130])
    pieces = [y]
    for t in range(130, 135):
        y_t, state = mixer.step(x[:, t], state)
        pieces.append(y_t[:, None])
    pieces.append(mixer.prefill(x[:, 135:], state)[0])
    assert relative_error(torch.cat(pieces, 1), whole).max() < TOLERANCES["two forms"][torch.float64]
    state, steps = mixer.init_state(1), []
    for t in range(20):
        y_t, state = mixer.step(x[:, t], state)
        steps.append(y_t)
    assert relative_error(torch.stack(steps, 1), whole[:, :20]).max() < TOLERANCES["two forms"][torch.float64]


def transformers_mamba2(mixer, groups):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    options = mixer.config
    config = Mamba2Config(
        hidden_size=D,
        state_size=options.d_state,
        num_heads=mixer.num_heads,
        head_dim=options.head_dim,
        expand=options.expand,
        n_groups=groups,
        conv_kernel=options.conv_width,
        chunk_size=16,
        layer_norm_epsilon=1e-5,
        num_hidden_layers=1,
    )
    oracle = Mamba2Mixer(config, 0).eval()
    weights = dict(mixer.state_dict())
    renamed = {
        "conv1d.weight": weights.pop("conv_weight")[:, None],
        "conv1d.bias": weights.pop("conv_bias"),
        "norm.weight": weights.pop("norm_weight"),
    }
    oracle.load_state_dict(weights | renamed)
    return oracle, config


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_mamba2_is_the_one_of_transformers(groups):
    """The same weights give the same outputs, in parallel and through a decode, and the same state."""
    transformers = pytest.importorskip("transformers")
    mixer = build(Mamba2, d_state=12, head_dim=8, num_groups=groups, noise=0.1).eval()
    oracle, config = transformers_mamba2(mixer, groups)
    x = tokens()
    expected = oracle(x)
    assert_parity(mixer(x), expected)

    cache = transformers.DynamicCache(config=config)
    y, state = mixer.prefill(x[:, :60])
    assert_parity(y, oracle(x[:, :60], cache_params=cache))
    for t in range(60, 70):
        y_t, state = mixer.step(x[:, t], state)
        assert_parity(y_t, oracle(x[:, t : t + 1], cache_params=cache)[:, 0])
    assert_parity(state.ssm, cache.get_recurrent_state(0, state_idx=0).mT)
    # It keeps one input more than the next token needs.
    assert_parity(state.conv, cache.get_conv_state(0, state_idx=0)[..., 1:].mT)


@torch.no_grad()
def test_rwkv4_is_the_one_of_transformers():
    """The same weights give the same outputs, in parallel and token by token from a state, and the same state."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    # One sequence: for one token, the oracle mixes up those of a batch.
    mixer, x = build(RWKV4, noise=0.3, index=1, depth=3), tokens(B=1)
    oracle = RwkvSelfAttention(transformers.RwkvConfig(hidden_size=D, num_hidden_layers=1)).eval()
    weights = dict(mixer.state_dict())
    r, k, v = 1 - weights.pop("shifts")[:, None, None]
    renamed = {"time_mix_receptance": r, "time_mix_key": k, "time_mix_value": v}
    renamed |= {"time_decay": weights.pop("decay"), "time_first": weights.pop("bonus")}
    oracle.load_state_dict(weights | renamed)
    assert_parity(mixer(x), oracle(x)[0])

    empty = torch.zeros(1, D, 1)
    y, after = oracle(x[:, :60], [empty, *(empty.clone() for _ in range(3)), empty - 1e38], use_cache=True)
    got, state = mixer.prefill(x[:, :60])
    assert_parity(got, y)
    for t in range(60, 70):
        y, after = oracle(x[:, t : t + 1], after, use_cache=True)
        got, state = mixer.step(x[:, t], state)
        assert_parity(got, y[:, 0])
    for mine, theirs in zip((state.previous, *state.wkv), after[1:], strict=True):
        assert_parity(mine, theirs[..., 0])


@torch.no_grad()
def test_rwkv6_is_the_official_one(monkeypatch):
    """The time mixing of the authors' package, which normalises x first and adds it to the output."""
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    official = pytest.importorskip("rwkv.model").RWKV
    mixer = build(RWKV6, head_dim=8, mix_rank=3, decay_rank=5, noise=0.1, index=1, depth=2)
    H, K = mixer.num_heads, 8
    before = RWKV6State(torch.randn(1, D), torch.randn(1, H, K, K))
    x = tokens(B=1)[0]
    w, k, v, r, g = mixer.shifts
    absent = torch.empty(0)
    y, previous, S = official.att_seq_v6_0(
        None,
        x,
        before.previous[0],
        before.S[0],
        torch.ones(D),
        torch.zeros(D),
        mixer.norm.weight,
        mixer.norm.bias,
        *(mixer.shift, w, k, v, r, g, mixer.shift_down, mixer.shift_up, mixer.decay_down, mixer.decay_up),
        *(mixer.decay.view(H, K, 1), mixer.bonus.view(H, K, 1)),
        *(layer.weight.T for layer in (mixer.key, mixer.value, mixer.receptance, mixer.gate, mixer.output)),
        *[absent] * 20,
    )
    got, state = mixer.prefill(F.layer_norm(x, (D,))[None], before)
    assert_parity(got[0], y - x)
    assert_parity(state.S[0], S)
    assert_parity(state.previous[0], previous)


def heads_of(linear_outputs, H):
    return [y.unflatten(-1, (H, -1)) for y in linear_outputs]


@torch.no_grad()
def test_based_is_a_public_attention_between_two_projections():
    naive = pytest.importorskip("fla.ops.based.naive").naive_parallel_based
    mixer, x = build(Based, num_heads=2, feature_dim=6, noise=0.3), tokens()
    q, k, v = (y.transpose(1, 2) for y in heads_of(mixer.qkv(x).split([12, 12, D], -1), 2))
    assert_parity(mixer(x), mixer.out(naive(q, k, v).transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_linear_attention_with_taylor_features_is_based():
    based = build(Based, num_heads=2, feature_dim=6, noise=0.3)
    mixer = build(LinearAttention, num_heads=2, feature_map="taylor", feature_dim=6, seed=1)
    mixer.load_state_dict(based.state_dict())
    assert_parity(mixer(tokens()), based(tokens()))


@torch.no_grad()
def test_linear_attention_is_a_public_one_between_two_projections():
    naive = pytest.importorskip("fla.ops.linear_attn.naive").naive_chunk_linear_attn
    mixer, x = build(LinearAttention, num_heads=2, noise=0.3), tokens(128)
    q, k, v = heads_of(mixer.qkv(x).split([D, D, D], -1), 2)
    o = naive(F.elu(q) + 1, F.elu(k) + 1, v, normalize=True, scale=1.0)
    assert_parity(mixer(x), mixer.out(o.flatten(2)))


@torch.no_grad()
def test_retnet_is_a_public_retention_between_its_projections():
    naive = pytest.importorskip("fla.ops.retention.naive").naive_retention
    mixer, x = build(RetNet, num_heads=4, noise=0.3), tokens()
    q, k, v = (y.transpose(1, 2) for y in heads_of((mixer.q(x), mixer.k(x), mixer.v(x)), 4))
    o = naive(q, k, v).transpose(1, 2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_parity(mixer(x), mixer.out(o.flatten(2) * F.silu(mixer.gate(x))))


@torch.no_grad()
def test_gla_is_a_public_recurrence_between_its_projections():
    naive = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    mixer, x = build(GLA, num_heads=4, noise=0.3), tokens()
    g = mixer.decay_up(mixer.decay_down(x))
    q, k, v, g = heads_of((mixer.q(x), mixer.k(x), mixer.v(x), F.logsigmoid(g) / 16), 4)
    o = naive(q, k, v, g)[0]
    o = mixer.norm_weight * o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_parity(mixer(x), mixer.out(o.flatten(2) * F.silu(mixer.gate(x))))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_maps_give_weights_that_are_not_negative(name):
    phi = FEATURE_MAPS[name](3, 5)
    q, k = torch.randn(2, 2, 50, 3, 5, generator=torch.Generator().manual_seed(0))
    assert phi(q).shape == (2, 50, 3, phi.num_features)
    assert (torch.einsum("bthf,bshf->bhts", phi(q), phi(k)) >= 0).all()


def test_hedgehog_starts_as_a_softmax_of_both_signs():
    phi, x = FEATURE_MAPS["hedgehog"](2, 3), tokens(4, 1, 6).unflatten(-1, (2, 3))
    exps = torch.cat([(2 * x).exp(), (-2 * x).exp()], -1)
    torch.testing.assert_close(phi(x), exps / exps.sum(-1, keepdim=True))


def test_relu_before_anything_matches_is_zero_not_nan():
    mixer = build(LinearAttention, feature_map="relu")
    y = mixer(torch.zeros(1, 5, D))
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize(
    ("cls", "d_model", "options", "elements"),
    [
        # Published accounts of BASED count S and z, with each second-order product once.
        (Based, 48, {"feature_dim": 8}, 45 * 48 + 45),
        (Based, 64, {"feature_dim": 16}, 153 * 64 + 153),
        (Based, 128, {"feature_dim": 24, "num_heads": 4}, 4 * (325 * 32 + 325)),
        (LinearAttention, 64, {"num_heads": 2}, 2 * (32 * 32 + 32)),
        (LinearAttention, 64, {"feature_map": "hedgehog", "feature_dim": 8}, 16 * 64 + 16),
        (RetNet, 64, {"num_heads": 4}, 4 * 16 * 32),
        (GLA, 64, {"num_heads": 4}, 4 * 8 * 16),
        (Mamba2, 64, {"d_state": 16}, 128 * 16 + 3 * (128 + 2 * 16)),
        (RWKV4, 64, {}, 4 * 64),
        (RWKV6, 64, {"head_dim": 32}, 64 * 32 + 64),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_state_is_what_the_recurrence_needs(cls, d_model, options, elements):
    mixer = build(cls, d_model=d_model, **options)
    _, state = mixer.prefill(tokens(5, d_model=d_model))
    for measured in (measure_state(mixer.init_state(2)), measure_state(state)):
        assert measured.elements == elements
        assert measured.bytes == 4 * elements


@torch.no_grad()
def test_mamba2_starts_as_the_official_code_has_it():
    mixer = build(Mamba2, d_model=512, head_dim=2, depth=4)
    dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 1e-3 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1
    assert dt.log().mean() == pytest.approx(math.log(1e-2), abs=0.2)
    assert 1 <= A.min() < 1.5
    assert 15.5 < A.max() <= 16
    assert A.mean() == pytest.approx(8.5, abs=0.5)
    assert (mixer.D == 1).all()
    # torch's default for 1024 inputs, over sqrt(depth).
    assert mixer.out_proj.weight.abs().max() == pytest.approx(1024**-0.5 / 2, rel=1e-2)
    exempt = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert exempt == {"dt_bias", "A_log", "D"}


@torch.no_grad()
def test_rwkv4_starts_as_the_official_code_has_it():
    first, last = (build(RWKV4, d_model=64, index=i, depth=3) for i in (0, 2))
    assert first.decay[0] == last.decay[0] == -5
    assert first.decay[-1] == last.decay[-1] == 3
    assert first.decay[32] == pytest.approx(-5 + 8 * (32 / 63) ** 0.7, abs=1e-5)
    assert last.decay[32] == pytest.approx(-5 + 8 * (32 / 63) ** 2, abs=1e-5)
    torch.testing.assert_close(first.bonus[:4], math.log(0.3) + torch.tensor([0.0, 0.5, -0.5, 0.0]))
    # Half way through the channels: of r, k, v.
    torch.testing.assert_close(first.shifts[:, 32], 1 - torch.tensor([0.5**0.5, 0.5, 0.5]))
    assert last.shifts[2, 32] == pytest.approx(1 - 0.5 ** (1 / 3) - 0.3)
    torch.testing.assert_close(first.value.weight @ first.value.weight.T, torch.eye(64), rtol=0, atol=1e-5)
    assert not any(linear.weight.any() for linear in (first.receptance, first.key, first.output))
    decayed = {name for name, p in first.named_parameters() if p.dim() > 1 and not hasattr(p, "_no_weight_decay")}
    assert decayed == {f"{name}.weight" for name in ("receptance", "key", "value", "output")}


@torch.no_grad()
def test_rwkv6_starts_as_the_official_code_has_it():
    first, last = (build(RWKV6, d_model=64, index=i, depth=3) for i in (0, 2))
    assert first.decay[0] == last.decay[0] == -6
    assert first.decay[-1] == last.decay[-1] == -1
    assert first.decay[32] == pytest.approx(-6 + 5 * (32 / 63) ** 0.7)
    assert last.decay[32] == pytest.approx(-6 + 5 * (32 / 63) ** 2)
    torch.testing.assert_close(first.bonus.flatten()[:4], torch.tensor([0.0, 0.1, -0.1, 0.0]))
    torch.testing.assert_close(last.bonus.flatten()[:2], torch.tensor([1.0, 1.1 - 1 / 63]))
    # Half way through the channels: of w, k, v, then r, g.
    torch.testing.assert_close(first.shifts[:, 32], 1 - torch.tensor([0.5, 0.5, 0.5, 0.5**0.5, 0.5**0.5]))
    assert last.shifts[2, 32] == pytest.approx(1 - 0.5 ** (1 / 3) - 0.3)
    assert last.norm.weight[0] == 1
    assert first.norm.weight[0] == pytest.approx((1 / 3) ** 0.7)
    assert not first.output.weight.any()
    for linear, gain in ((first.receptance, 1), (first.key, 0.1), (first.value, 1), (first.gate, 0.1)):
        torch.testing.assert_close(linear.weight @ linear.weight.T, gain**2 * torch.eye(64), rtol=0, atol=1e-5)
    decayed = {name for name, p in first.named_parameters() if p.dim() > 1 and not hasattr(p, "_no_weight_decay")}
    assert decayed == {f"{name}.weight" for name in ("receptance", "key", "value", "gate", "output")}


@pytest.mark.parametrize("T", [1, 64, 200])
@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_gradients_stay_finite_for_large_inputs(cls, options, T):
    mixer, x = build(cls, noise=0.5, **options), (30 * tokens(T)).requires_grad_()
    y = mixer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, *mixer.parameters()))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Based, {"num_heads": 5}, "d_model 32 is not divisible by num_heads 5"),
        (LinearAttention, {"num_heads": 3}, "d_model 32 is not divisible by num_heads 3"),
        (GLA, {"expand_k": 0.4}, "expand_k 0.4 x d_model 32 = 13 is not divisible by num_heads 4"),
        (RetNet, {"num_heads": 3}, "d_model 32 is not divisible by num_heads 3"),
        (RWKV6, {"head_dim": 64}, r"d_model 32 is not divisible by head_dim 64; use one of \[1, 2, 4, 8, 16, 32\]"),
        (Mamba2, {"head_dim": 48}, r"expand 2 x d_model 32 = 64 is not divisible by head_dim 48; use one of \[1, 2"),
        (
            Mamba2,
            {"num_groups": 2},
            r"64 channels / head_dim 64 = 1 is not divisible by num_groups 2; use one of \[1\]",
        ),
    ],
)
def test_sizes_that_do_not_fit_say_so(cls, options, message):
    with pytest.raises(ConfigError, match=message):
        build(cls, **options)
