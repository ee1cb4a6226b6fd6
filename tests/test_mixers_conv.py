"""gated_conv, mamba, hyena, h3, s4d, mingru: what they compute, how they start, what their states hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.errors import ConfigError, UnsupportedError
from zoo.mixers import LayerInfo, Mixer
from zoo.mixers.gated_conv import GatedConv
from zoo.mixers.h3 import H3
from zoo.mixers.hyena import Hyena, HyenaFilter
from zoo.mixers.mamba import Mamba
from zoo.mixers.mingru import MinGRU
from zoo.mixers.s4d import S4D, DiagonalSSM
from zoo.state import measure_state


def build(cls: type[Mixer], d_model: int = 16, *, max_seq_len: int = 64, depth: int = 1, seed: int = 0, **options):
    """A mixer in fp64 with each parameter moved a little off its initial value."""
    torch.manual_seed(seed)
    mixer = cls(cls.Config(**options), LayerInfo(d_model, max_seq_len=max_seq_len, depth=depth)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def inputs(B: int = 2, T: int = 33, D: int = 16, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decode(mixer: Mixer, x: torch.Tensor):
    state, outputs = mixer.init_state(len(x)), []
    for x_t in x.unbind(1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, 1), state


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# --- gated_conv ---


@pytest.mark.parametrize("W", [1, 3, 8])
def test_gated_conv_is_its_formula(W):
    mixer, x = build(GatedConv, conv_width=W), inputs()
    conv = F.conv1d(F.pad(x.mT, (W - 1, 0)), mixer.conv_weight[:, None], mixer.conv_bias, groups=16).mT
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), (x @ mixer.projection.weight.T + mixer.projection.bias) * conv)


def test_gated_conv_keeps_w_minus_1_inputs_and_starts_as_in_the_published_runs():
    torch.manual_seed(0)
    mixer = GatedConv(GatedConv.Config(), LayerInfo(512))
    assert measure_state(mixer.init_state(3)).elements == 2 * 512
    assert mixer.projection.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not mixer.projection.bias.any()
    reference = nn.Conv1d(512, 512, 3, groups=512)
    for parameter, like in ((mixer.conv_weight, reference.weight), (mixer.conv_bias, reference.bias)):
        assert parameter.detach().abs().max().item() <= 3**-0.5
        assert parameter.std().item() == pytest.approx(like.std().item(), rel=0.1)


# --- mamba ---


@pytest.fixture(scope="module")
def mamba_pair():
    """Ours and transformers' mixer, in fp32 and with the same weights."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=40, state_size=7, conv_kernel=4, expand=2, num_hidden_layers=1)
    theirs = MambaMixer(config, layer_idx=0).eval()
    ours = Mamba(Mamba.Config(d_state=7), LayerInfo(40))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        weights = theirs.state_dict()
        weights["conv_weight"] = weights.pop("conv1d.weight")[:, 0]
        weights["conv_bias"] = weights.pop("conv1d.bias")
        ours.load_state_dict(weights)
    return ours, theirs


def test_mamba_equals_transformers(mamba_pair):
    ours, theirs = mamba_pair
    x = inputs(3, 70, 40).float()
    with torch.no_grad():
        expected = theirs(x)
        assert relative_error(ours(x), expected) < 1e-6
        assert relative_error(decode(ours, x)[0], expected) < 1e-6


def test_mamba_gradients_equal_transformers(mamba_pair):
    ours, theirs = mamba_pair
    x, weight = inputs(3, 70, 40).float(), inputs(3, 70, 40, seed=2).float()
    got = torch.autograd.grad((ours(x) * weight).sum(), list(ours.parameters()))
    expected = torch.autograd.grad((theirs(x) * weight).sum(), list(theirs.parameters()))
    expected = dict(zip(dict(theirs.named_parameters()), expected, strict=True))
    names = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias"}
    for (name, parameter), gradient in zip(ours.named_parameters(), got, strict=True):
        like = expected[names.get(name, name)].reshape(parameter.shape)
        assert relative_error(gradient, like) < 1e-5, name


def test_mamba_starts_as_in_the_official_code():
    torch.manual_seed(0)
    mixer = Mamba(Mamba.Config(d_state=16), LayerInfo(256, depth=4))
    assert mixer.dt_proj.in_features == 16
    assert torch.equal(mixer.A_log.exp().round(), torch.arange(1.0, 17).expand(512, 16))
    assert torch.equal(mixer.D, torch.ones(512))
    steps = F.softplus(mixer.dt_proj.bias.detach().double())
    assert 1e-3 * 0.999 <= float(steps.min()) < 1.2e-3
    assert 0.083 < float(steps.max()) <= 0.1 * 1.001
    # Log-uniform: the mean of the logarithm is halfway between those of the ends.
    assert float(steps.log().mean()) == pytest.approx(math.log(0.01), abs=0.2)
    assert mixer.dt_proj.weight.abs().max().item() == pytest.approx(0.25, rel=0.01)
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(512**-0.5 / 2, rel=0.01)
    exempt = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert exempt == {"A_log", "D", "dt_proj.bias"}


def test_mamba_state_and_rank():
    mixer = Mamba(Mamba.Config(d_state=8, dt_rank=3, expand=3, conv_width=2), LayerInfo(20))
    assert mixer.dt_proj.in_features == 3
    assert measure_state(mixer.init_state(2)).elements == 60 * 8 + 60 * 1


# --- hyena ---


def test_hyena_is_its_formula():
    mixer, x = build(Hyena, max_seq_len=40), inputs(T=33)
    with torch.no_grad():
        projected = F.conv1d(
            F.pad(mixer.in_proj(x).mT, (2, 0)), mixer.conv_weight[:, None], mixer.conv_bias, groups=48
        ).mT
        x1, x2, v = projected.chunk(3, dim=-1)
        u = x1 * v
        spectrum = torch.fft.rfft(u, n=80, dim=1) * torch.fft.rfft(mixer.filter(40), n=80).T
        y = torch.fft.irfft(spectrum, n=80, dim=1)[:, :33] + mixer.skip * u
        torch.testing.assert_close(mixer(x), mixer.out_proj(x2 * y))


def test_hyena_filter_has_its_window_and_no_other_length_dependence():
    torch.manual_seed(0)
    filters = HyenaFilter(d_model=6, max_seq_len=101, width=8, bands=3, frequency=2.0)
    assert filters.positions.shape == (101, 7)
    # Channel 0 has fallen to 1 % at 1.5 times the length, channel 5 at 0.3 times.
    torch.testing.assert_close(filters.window[-1, 0], torch.tensor(0.01 ** (1 / 1.5)))
    torch.testing.assert_close(filters.window[30, 5], torch.tensor(0.01))
    assert torch.equal(filters.window[0], torch.ones(6))
    torch.testing.assert_close(filters(101)[:, :50], filters(50))
    assert all(p._no_weight_decay for p in filters.parameters())


def test_hyena_state_is_every_input():
    mixer = build(Hyena)
    _, state = decode(mixer, inputs(T=21))
    assert measure_state(state).elements == 21 * 16 + 2 * 3 * 16
    assert measure_state(mixer.prefill(inputs(T=50))[1]).elements == 50 * 16 + 2 * 3 * 16


def test_hyena_refuses_more_tokens_than_its_filter_has_taps():
    mixer = build(Hyena, max_seq_len=10)
    y, state = mixer.prefill(inputs(T=10))
    assert y.isfinite().all()
    for call in (lambda: mixer(inputs(T=11)), lambda: mixer.step(inputs(T=1)[:, 0], state)):
        with pytest.raises(UnsupportedError, match="11 tokens, but its filters are 10 taps"):
            call()


# --- the diagonal state space model, h3 and s4d ---


@pytest.fixture
def ssm():
    torch.manual_seed(0)
    return DiagonalSSM(num_systems=5, d_state=8).double()


def test_s4d_lin_starts_where_the_paper_says(ssm):
    n = torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(-ssm.log_A_real.exp().detach(), torch.full((5, 4), -0.5, dtype=torch.float64))
    torch.testing.assert_close(ssm.A_imag.detach(), (math.pi * n).expand(5, 4), rtol=1e-6, atol=1e-6)
    assert ((ssm.log_dt.exp() >= 1e-3) & (ssm.log_dt.exp() <= 0.1)).all()
    torch.manual_seed(0)
    C = torch.view_as_complex(DiagonalSSM(64, 64).C.detach())
    assert float(C.abs().square().mean()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 130])
def test_s4d_kernel_is_its_definition(ssm, T):
    # Zero-order hold of dx/dt = A x + u with all N conjugate states, real by symmetry (arXiv 2206.11893).
    A = torch.complex(-ssm.log_A_real.exp(), ssm.A_imag)
    A = torch.cat([A, A.conj()], 1)
    C = torch.view_as_complex(ssm.C)
    C = torch.cat([C, C.conj()], 1)
    dt = ssm.log_dt.exp()[:, None]
    A_bar, B_bar = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    kernel = torch.stack([(C * B_bar * A_bar**j).sum(1) for j in range(T)], 1)
    torch.testing.assert_close(kernel.imag, torch.zeros_like(kernel.imag))
    torch.testing.assert_close(ssm.kernel(T), kernel.real, rtol=1e-10, atol=1e-12)


def test_s4d_kernel_is_the_impulse_response_of_the_recurrence(ssm):
    impulse = torch.zeros(1, 60, 1, 5, dtype=torch.float64)
    impulse[:, 0] = 1
    state, outputs = ssm.init_state(1), []
    for t in range(60):
        y, state = ssm(impulse[:, t : t + 1], state, return_state=True)
        outputs.append(y[0, 0, 0])
    response = torch.stack(outputs, 1)
    response[:, 0] -= ssm.D
    torch.testing.assert_close(ssm.kernel(60), response, rtol=1e-10, atol=1e-12)


def test_s4d_state_is_n_numbers_a_channel():
    mixer, x = build(S4D, d_state=6), inputs()
    y, state = decode(mixer, x)
    assert measure_state(state).elements == 16 * 6
    convolved = torch.stack(
        [(x[:, : t + 1].flip(1) * mixer.ssm.kernel(33)[:, : t + 1].T).sum(1) for t in range(33)], dim=1
    )
    expected = F.glu(mixer.out_proj(F.gelu(convolved + mixer.ssm.D * x)))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("K", [1, 4])
def test_h3_is_its_recurrence(K):
    mixer, x = build(H3, d_state=6, head_dim=K), inputs()
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    past = F.pad(k, (0, 0, 5, 0))
    shifted = sum(mixer.shift[:, j] * past[:, 5 - j : 5 - j + 33] for j in range(6)) + mixer.shift_D * k
    A = torch.complex(-mixer.diagonal.log_A_real.exp(), mixer.diagonal.A_imag)
    a_bar = torch.exp(mixer.diagonal.log_dt.exp()[:, None] * A)
    c = torch.view_as_complex(mixer.diagonal.C) * (a_bar - 1) / A
    heads = 16 // K
    q, shifted, v = (y.view(2, 33, K, heads).mT for y in (q, shifted, v))
    state, outputs = torch.zeros(2, heads, K, K, 3, dtype=torch.complex128), []
    for t in range(33):
        kv = shifted[:, t, :, :, None] * v[:, t, :, None, :]
        state = a_bar[:, None, None] * state + kv[..., None]
        y = 2 * (c[:, None, None] * state).sum(-1).real + mixer.diagonal.D[:, None, None] * kv
        outputs.append(torch.einsum("bhi,bhij->bjh", q[:, t], y).flatten(1))
    expected = mixer.out_proj(torch.stack(outputs, 1))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decode(mixer, x)[0], expected, rtol=1e-9, atol=1e-9)
    assert measure_state(mixer.init_state(1)).elements == 5 * 16 + 16 * K * 6


def test_h3_refuses_heads_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"d_model 16 is not divisible by head_dim 3; use one of \[1, 2, 4, 8, 16\]"):
        build(H3, head_dim=3)


# --- mingru ---


def test_mingru_is_its_recurrence():
    mixer, x = build(MinGRU, expand=2), inputs()
    with torch.no_grad():
        # Gates from wide open to shut tight, and one shut beyond what fp32 can hold.
        mixer.in_proj.bias[:32] = torch.linspace(-40, 40, 32)
        mixer.in_proj.bias[0] = -200
        gate, candidate = mixer.in_proj(x).chunk(2, dim=-1)
        h, outputs = torch.zeros(2, 32, dtype=torch.float64), []
        for t in range(33):
            h = (1 - gate[:, t].sigmoid()) * h + gate[:, t].sigmoid() * candidate[:, t]
            outputs.append(mixer.out_proj(h))
    torch.testing.assert_close(mixer(x), torch.stack(outputs, 1), rtol=1e-9, atol=1e-9)
    y, state = decode(mixer, x)
    torch.testing.assert_close(y, torch.stack(outputs, 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.h[..., 0], h, rtol=1e-9, atol=1e-9)
    mixer.float()
    gradients = torch.autograd.grad(mixer(x.float()).square().sum(), list(mixer.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


# --- precision ---


@pytest.mark.parametrize("cls", [GatedConv, Mamba, Hyena, H3, S4D, MinGRU])
def test_autocast_rounds_products_only(cls):
    mixer, x = build(cls, max_seq_len=512), inputs(T=300)
    mixer, x = mixer.float(), x.float()
    with torch.no_grad():
        exact = mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = mixer(x)
    assert relative_error(rounded, exact) < 0.02
