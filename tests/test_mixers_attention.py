"""attention, sliding_window, rotary: parity with public code, what the window sees, the state, the initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.mixers import LayerInfo
from zoo.mixers.attention import Attention
from zoo.mixers.rotary import rotate
from zoo.mixers.sliding_window import SlidingWindow
from zoo.state import measure_state

D = 24


def build(cls, *, d_model=D, depth=1, rotary_model=False, noise=0.3, **options):
    torch.manual_seed(0)
    mixer = cls(cls.Config(**options), LayerInfo(d_model, depth=depth, rotary=rotary_model))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return mixer


def tokens(T, B=2, d_model=D):
    return torch.randn(B, T, d_model, generator=torch.Generator().manual_seed(1))


def scan(mixer, x):
    state = mixer.init_state(len(x))
    outputs = []
    for x_t in x.unbind(1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, dim=1), state


def assert_parity(got, expected):
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_attention_is_torch_multihead_attention():
    mixer, x = build(Attention, num_heads=3), tokens(19)
    oracle = nn.MultiheadAttention(D, 3, batch_first=True)
    oracle.load_state_dict(
        {
            "in_proj_weight": mixer.qkv.weight,
            "in_proj_bias": mixer.qkv.bias,
            "out_proj.weight": mixer.out.weight,
            "out_proj.bias": mixer.out.bias,
        }
    )
    expected, _ = oracle(x, x, x, attn_mask=torch.ones(19, 19, dtype=torch.bool).triu(1), need_weights=False)
    assert_parity(mixer(x), expected)


@pytest.mark.parametrize("window", [None, 5])
def test_rotary_and_shared_key_heads_are_those_of_transformers_llama(window):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    heads, groups, T = 6, 2, 33
    config = llama.LlamaConfig(
        hidden_size=D, num_attention_heads=heads, num_key_value_heads=groups, attention_bias=True, head_dim=D // heads
    )
    config._attn_implementation = "eager"
    options = {"num_heads": heads, "num_kv_heads": groups, "rotary": True}
    mixer = build(Attention, **options) if window is None else build(SlidingWindow, window=window, **options)
    oracle, x = llama.LlamaAttention(config, layer_idx=0), tokens(T)
    K = D // heads
    weights = mixer.qkv.weight.split([heads * K, groups * K, groups * K])
    biases = mixer.qkv.bias.split([heads * K, groups * K, groups * K])
    state = {"o_proj.weight": mixer.out.weight, "o_proj.bias": mixer.out.bias}
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        state |= {f"{name}_proj.weight": weight, f"{name}_proj.bias": bias}
    oracle.load_state_dict(state)
    position = torch.arange(T)
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= (window or T))
    mask = torch.zeros(T, T).masked_fill(hidden, float("-inf"))
    angles = llama.LlamaRotaryEmbedding(config)(x, position[None])
    expected, _ = oracle(x, position_embeddings=angles, attention_mask=mask[None, None])
    assert_parity(mixer(x), expected)
    assert_parity(scan(mixer, x)[0], expected)


@pytest.mark.parametrize("window", [1, 2, 7])
def test_a_window_sees_itself_and_the_tokens_just_before(window):
    mixer = build(SlidingWindow, window=window)
    x = tokens(30, B=1).requires_grad_()
    for t in (0, 5, 29):
        (gradient,) = torch.autograd.grad(mixer(x)[0, t].sum(), x)
        reached = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
        assert reached == list(range(max(0, t - window + 1), t + 1))


@pytest.mark.parametrize("rotary", [False, True])
def test_a_window_as_long_as_the_input_is_full_attention(rotary):
    x = tokens(20)
    mixer, full = build(SlidingWindow, window=20, rotary=rotary), build(Attention, rotary=rotary)
    full.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer(x), full(x))


def test_a_rotary_window_decodes_far_beyond_its_length_without_a_position():
    mixer, x = build(SlidingWindow, window=4, num_heads=2, rotary=True), tokens(600, B=1)
    decoded, state = scan(mixer, x)
    assert_parity(decoded, mixer(x))
    assert [tensor.shape for tensor in state] == [(1, 3, 2, D // 2)] * 2


@pytest.mark.parametrize(
    ("cls", "options", "tokens_held"),
    [(Attention, {}, [0, 1, 50]), (SlidingWindow, {"window": 8}, [0, 1, 7]), (SlidingWindow, {"window": 1}, [0, 0, 0])],
)
def test_the_state_is_keys_and_values_of_the_tokens_that_can_still_be_seen(cls, options, tokens_held):
    mixer = build(cls, num_heads=4, num_kv_heads=2, **options)
    states = [mixer.init_state(3), mixer.prefill(tokens(1, B=3))[1], mixer.prefill(tokens(50, B=3))[1]]
    key_channels = D // 4 * 2
    assert [measure_state(state).elements for state in states] == [2 * n * key_channels for n in tokens_held]
    assert mixer.state_horizon == (options["window"] - 1 if options else None)


@pytest.mark.parametrize("rotary", [False, True])
def test_positions_are_as_the_model_says_unless_the_config_does(rotary):
    assert build(Attention, rotary_model=rotary).rotary == rotary
    assert build(Attention, rotary_model=not rotary, rotary=rotary).rotary == rotary


def test_rotary_scores_depend_on_distances_alone():
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 9, 2, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    scores = [torch.einsum("bthk,bshk->bhts", rotate(q, start), rotate(k, start)) for start in (0, 1, 1000)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(scores[0], torch.einsum("bthk,bshk->bhts", q, k))
    torch.testing.assert_close(rotate(q)[:, 0], q[:, 0])
    assert rotate(q.bfloat16()).dtype == torch.bfloat16


def test_initialisation_is_gpt2s():
    mixer = build(Attention, d_model=256, depth=8, noise=0)
    assert mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert mixer.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert not mixer.qkv.bias.any()
    assert not mixer.out.bias.any()


@pytest.mark.parametrize("groups", [4, 2])
def test_a_mimetic_start_matches_tokens_with_their_like_and_takes_away_what_is_there(groups):
    mixer = build(Attention, d_model=256, noise=0.0, num_heads=4, num_kv_heads=groups, init="mimetic")
    q, k, v = mixer.qkv.weight.unflatten(0, (-1, 64)).split([4, groups, groups])
    assert q.std().item() == pytest.approx((0.4 / 64) ** 0.5, rel=0.02)
    assert v.std().item() == pytest.approx(0.02, rel=0.02)
    for head, out in enumerate(mixer.out.weight.split(64, dim=1)):
        assert torch.equal(out, -v[head * groups // 4].T)
    for group in range(groups):
        assert torch.equal(k[group], q[group * 4 // groups])


def test_the_published_start_is_not_in_a_trials_key():
    for cls in (Attention, SlidingWindow):
        assert "init" not in cls.Config().model_dump()
        mimetic = cls.Config(init="mimetic", num_heads=2)
        assert cls.Config.model_validate(mimetic.model_dump(mode="json")) == mimetic
        assert cls.Config.model_validate(cls.Config(num_heads=2).model_dump(mode="json")).init == "gpt2"


def test_what_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="d_model 24 is not divisible by num_heads 5"):
        build(Attention, num_heads=5)
    with pytest.raises(ConfigError, match="num_heads 4 is not divisible by num_kv_heads 3"):
        build(Attention, num_heads=4, num_kv_heads=3)
    with pytest.raises(ConfigError, match="even head dim, not 3"):
        build(SlidingWindow, num_heads=8, rotary=True)
    with pytest.raises(ConfigError, match="even head dim, not 3"):
        build(Attention, num_heads=8, rotary_model=True)
    assert build(Attention, num_heads=8, rotary=False).head_dim == 3
