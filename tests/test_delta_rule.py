from __future__ import annotations

import pytest
import torch

from zoo.errors import UnsupportedError
from zoo.kernels.delta_rule import delta_rule, generalized_delta_rule, packed_delta_rule

DECAYS = ["none", "step", "channel"]


def normalize(x):
    return x / x.norm(dim=-1, keepdim=True)


def problem(rule, T, decay="none", B=2, H=2, K=5, V=3, dtype=torch.float64, steps=(0.0, -1e-6, -0.5, -20.0), seed=0):
    """The op's tensor arguments by name, with decays drawn from `steps`."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    arguments = {"q": randn(B, T, H, K), "k": normalize(randn(B, T, H, K)), "v": randn(B, T, H, V)}
    if rule is delta_rule:
        arguments["beta"] = 2 * torch.rand(B, T, H, generator=draw, dtype=torch.float64)
    else:
        kappa = normalize(randn(B, T, H, K))
        arguments |= {"a": -kappa, "b": kappa * torch.rand(B, T, H, K, generator=draw, dtype=torch.float64)}
    if decay != "none":
        shape = (B, T, H, K) if decay == "channel" else (B, T, H)
        arguments["decay"] = torch.tensor(steps).double()[torch.randint(len(steps), shape, generator=draw)]
    arguments["initial_state"] = randn(B, H, K, V)
    return {name: x.to(dtype).requires_grad_() for name, x in arguments.items()}


def outputs_and_gradients(rule, arguments, **options):
    """o, S and the gradient of every argument through both."""
    o, S = rule(**arguments, **options)
    slope = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape)
    gradients = torch.autograd.grad((o * slope).sum() + S.square().sum(), list(arguments.values()))
    return {"o": o, "S": S, **dict(zip(arguments, gradients, strict=True))}


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_same(found, expected, tolerance):
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("rule", [delta_rule, generalized_delta_rule])
def test_chunked_is_the_reference(rule, T, decay):
    arguments = problem(rule, T, decay)
    expected = outputs_and_gradients(rule, arguments, impl="reference")
    assert_same(outputs_and_gradients(rule, arguments, impl="chunked"), expected, 1e-12)


@pytest.mark.parametrize("decay", ["step", "channel"])
@pytest.mark.parametrize("T", [1, 17, 32, 65])
@pytest.mark.parametrize("rule", [delta_rule, generalized_delta_rule])
def test_chunked_with_a_bound_on_the_decay_is_the_reference(rule, T, decay):
    arguments = problem(rule, T, decay, steps=(0.0, -1e-6, -0.3, -1.8))
    expected = outputs_and_gradients(rule, arguments, impl="reference")
    assert_same(outputs_and_gradients(rule, arguments, min_decay=-1.8, impl="chunked"), expected, 1e-12)


@pytest.mark.parametrize("decay", ["step", "channel"])
@pytest.mark.parametrize("rule", [delta_rule, generalized_delta_rule])
def test_decays_of_any_size_are_exact_in_fp32(rule, decay):
    steps = (0.0, -1e-6, -1e-3, -20.0, -300.0)
    exact = problem(rule, 130, decay, steps=steps)
    expected = outputs_and_gradients(rule, exact, impl="reference")
    single = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    assert_same(outputs_and_gradients(rule, single, impl="chunked"), expected, 5e-6)


@pytest.mark.parametrize("rule", [delta_rule, generalized_delta_rule])
@pytest.mark.parametrize("decay", ["step", "channel"])
def test_a_bound_that_is_too_low_to_use_changes_nothing(rule, decay):
    arguments = problem(rule, 40, decay, dtype=torch.float32)
    expected = outputs_and_gradients(rule, arguments)
    found = outputs_and_gradients(rule, arguments, min_decay=-20.0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", [delta_rule, generalized_delta_rule])
def test_segments_carry_the_state(rule, decay, impl):
    arguments = {name: x.detach() for name, x in problem(rule, 50, decay).items()}
    o, S = rule(**arguments, impl=impl)
    S_t = arguments.pop("initial_state")
    outputs = []
    for segment in (slice(0, 7), slice(7, 40), slice(40, 50)):
        o_t, S_t = rule(**{name: x[:, segment] for name, x in arguments.items()}, initial_state=S_t, impl=impl)
        outputs.append(o_t)
    torch.testing.assert_close(torch.cat(outputs, dim=1), o, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(S_t, S, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("rule", [delta_rule, generalized_delta_rule])
def test_no_state_is_a_state_of_zeros_and_may_be_left_out(rule, impl):
    arguments = {name: x.detach() for name, x in problem(rule, 70, "channel").items()}
    zeros = torch.zeros_like(arguments.pop("initial_state"))
    o, S = rule(**arguments, impl=impl)
    o_zeros, S_zeros = rule(**arguments, initial_state=zeros, impl=impl)
    torch.testing.assert_close(o, o_zeros)
    torch.testing.assert_close(S, S_zeros)
    o_alone, nothing = rule(**arguments, return_state=False, impl=impl)
    assert nothing is None
    assert torch.equal(o_alone, o)


@pytest.mark.parametrize("impl", ["reference", "chunked", "step"])
@pytest.mark.parametrize("decay", ["none", "step"])
def test_packed_delta_rule_is_the_rule_of_unit_keys_and_of_queries_shorter_by_the_root_of_their_size(decay, impl):
    x = {name: t.detach() for name, t in problem(delta_rule, 1 if impl == "step" else 20, decay).items()}
    q, k, v = (torch.randn(*x[name].shape, dtype=torch.float64) for name in "qkv")
    own = {name: t for name, t in x.items() if name not in "qkv"}
    want = delta_rule(normalize(q) / 5**0.5, normalize(k), v, **own, impl=impl)
    qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=2)
    for got, expected in zip(packed_delta_rule(qkv, **own, key_dim=5, eps=0.0, impl=impl), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("channels", "key_dim"), [(26, 4), (16, 4), (12, 4)])
def test_packed_delta_rule_says_what_does_not_fit(channels, key_dim):
    with pytest.raises(UnsupportedError, match=f"{channels} channels"):
        packed_delta_rule(torch.zeros(1, 2, channels), torch.zeros(1, 2, 3 if channels == 26 else 2), key_dim=key_dim)


@pytest.mark.parametrize("decay", DECAYS)
def test_delta_rule_is_a_case_of_the_generalized_one(decay):
    x = problem(delta_rule, 40, decay)
    kept = torch.ones(1, dtype=torch.float64)
    if decay != "none":
        kept = (x["decay"] if decay == "channel" else x["decay"][..., None]).exp()
    write = x["beta"][..., None] * x["k"]
    general = {"q": x["q"], "k": write, "v": x["v"], "a": kept * x["k"], "b": -write}
    general |= {name: x[name] for name in ("decay", "initial_state") if name in x}
    torch.testing.assert_close(generalized_delta_rule(**general), delta_rule(**x), rtol=1e-10, atol=1e-11)


def test_a_full_step_replaces_what_the_key_held():
    k = normalize(torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0)))
    k[:, 1] = k[:, 0]
    v = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    o, S = delta_rule(k, k, v, torch.ones(1, 2, 1))
    torch.testing.assert_close(o, v)
    torch.testing.assert_close(k[0, 1, 0] @ S[0, 0], v[0, 1, 0])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rule", [delta_rule, generalized_delta_rule])
def test_bf16_accumulates_in_fp32(rule, autocast, impl):
    arguments = {name: x.detach().bfloat16() for name, x in problem(rule, 65, "channel", steps=(0.0, -0.5)).items()}
    exact_o, exact_S = rule(**{name: x.double() for name, x in arguments.items()}, impl="reference")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        o, S = rule(**arguments, impl=impl)
    assert o.dtype == torch.bfloat16
    assert S.dtype == torch.float32
    assert relative_error(o, exact_o) < 4e-3  # one rounding to bf16
    assert relative_error(S, exact_S) < 1e-5


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_later_inputs_change_nothing(impl):
    arguments = {name: x.detach() for name, x in problem(generalized_delta_rule, 40, "channel").items()}
    o, _ = generalized_delta_rule(**arguments, impl=impl)
    for name in ("q", "k", "v", "a", "b", "decay"):
        later = arguments[name].clone()
        later[:, 23:] *= 3
        changed, _ = generalized_delta_rule(**{**arguments, name: later}, impl=impl)
        assert torch.equal(changed[:, :23], o[:, :23])
        assert not torch.equal(changed[:, 23:], o[:, 23:])


def fla_arguments(x):
    return {name: tensor.detach().float() for name, tensor in x.items()}


def test_delta_rule_is_the_naive_one_of_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.delta_rule.naive")
    x = fla_arguments(problem(delta_rule, 96, K=16, V=16))
    heads_first = [x[name].transpose(1, 2) for name in ("q", "k", "v", "beta")]
    expected, state = naive.delta_rule_recurrence(*heads_first, initial_state=x["initial_state"])
    o, S = delta_rule(**{**x, "q": x["q"] * 16**-0.5})
    assert relative_error(o, expected.transpose(1, 2).double()) < 1e-5
    assert relative_error(S, state.double()) < 1e-5


def test_gated_delta_rule_is_the_naive_one_of_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    x = fla_arguments(problem(delta_rule, 96, "step", K=16, V=8))
    expected, state = naive.naive_recurrent_gated_delta_rule(
        x["q"], x["k"], x["v"], x["beta"], x["decay"], 1.0, x["initial_state"], output_final_state=True
    )
    o, S = delta_rule(**x)
    assert relative_error(o, expected.double()) < 1e-5
    assert relative_error(S, state.double()) < 1e-5


def test_delta_rule_with_a_decay_per_channel_is_the_naive_kda_of_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.kda.naive")
    x = fla_arguments(problem(delta_rule, 96, "channel", K=16, V=8))
    expected, state = naive.naive_recurrent_kda(
        x["q"], x["k"], x["v"], x["decay"], x["beta"], 1.0, x["initial_state"], output_final_state=True
    )
    o, S = delta_rule(**x)
    assert relative_error(o, expected.double()) < 1e-5
    assert relative_error(S, state.double()) < 1e-5


def test_generalized_delta_rule_is_the_naive_dplr_of_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive")
    x = fla_arguments(problem(generalized_delta_rule, 96, "channel", K=16, V=16))
    heads_first = [x[name].transpose(1, 2) for name in ("q", "k", "v", "a", "b", "decay")]
    expected, state = naive.dplr_recurrence(*heads_first, initial_state=x["initial_state"])
    o, S = generalized_delta_rule(**{**x, "q": x["q"] * 16**-0.5})
    assert relative_error(o, expected.transpose(1, 2).double()) < 1e-5
    assert relative_error(S, state.double()) < 1e-5


def test_what_does_not_fit_is_named():
    x = problem(delta_rule, 6, "channel")
    with pytest.raises(UnsupportedError, match=r"k has shape \(2, 6, 2, 4\)"):
        delta_rule(**{**x, "k": x["k"][..., :4]})
    with pytest.raises(UnsupportedError, match=r"beta has shape \(2, 5, 2\)"):
        delta_rule(**{**x, "beta": x["beta"][:, :5]})
    with pytest.raises(UnsupportedError, match=r"decay has shape \(2,\)"):
        delta_rule(**{**x, "decay": torch.zeros(2)})
    with pytest.raises(UnsupportedError, match=r"initial_state has shape \(1, 2, 5, 3\)"):
        delta_rule(**{**x, "initial_state": x["initial_state"][:1]})
    with pytest.raises(UnsupportedError, match="T is 0"):
        delta_rule(**{name: tensor[:, :0] for name, tensor in x.items() if name != "initial_state"})
    with pytest.raises(UnsupportedError, match=r"min_decay 0\.5"):
        delta_rule(**x, min_decay=0.5)
    with pytest.raises(UnsupportedError, match="no backend 'fused'"):
        delta_rule(**x, impl="fused")
    y = problem(generalized_delta_rule, 6)
    with pytest.raises(UnsupportedError, match=r"b has shape \(2, 6, 2, 4\)"):
        generalized_delta_rule(**{**y, "b": y["b"][..., :4]})
