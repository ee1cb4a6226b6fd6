"""H3: a shift SSM lets keys look back, a diagonal SSM remembers key-value products, and queries read them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.kernels.backend import state_dtype
from zoo.kernels.long_conv import long_conv
from zoo.mixers.base import LayerInfo, Mixer


class H3State(NamedTuple):
    """keys (B, N-1, D): the shift SSM's state, the last keys in time order. memory (B, H, K, K, N/2, 2): the diagonal
    SSM's state for each product of a head's keys and values, complex numbers as pairs, fp32."""

    keys: Tensor
    memory: Tensor


class H3(Mixer):
    """y_t = W_o sum_i q_t^i SSM_diag(SSM_shift(k)^i * v^j)_t for channels i, j of a head (arXiv 2212.14052, alg. 1).

        SSM_shift(k)_t = sum_{j < N} c_j k_{t-j}
        SSM_diag(u)_t = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n h_t^n + D u_t,   h_t^n = exp(dt A_n) h_{t-1}^n + u_t

    N/2 conjugate pairs. Initialised as in the official code: c, C and D from N(0, 1), dt log-uniform in [1e-3, 0.1],
    A_n = -1/2 + i pi n, which is S4D-Lin (arXiv 2206.11893, eq. 9). The paper's SSM_shift has a skip of its own, which
    is one with the first tap.
    """

    class Config(Mixer.Config):
        d_state: int = Field(64, ge=2, description="N, states of the shift SSM and of the diagonal SSM; even.")
        head_dim: int = Field(1, ge=1, description="K, key and value channels that are multiplied with each other.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        D, N, K = layer.d_model, config.d_state, config.head_dim
        if N % 2:
            raise ConfigError(f"d_state {N} is odd; its states are conjugate pairs, so use {N - 1} or {N + 1}.")
        if D % K:
            allowed = [k for k in range(1, D + 1) if D % k == 0]
            raise ConfigError(f"d_model {D} is not divisible by head_dim {K}; use one of {allowed}.")
        H = D // K
        self.qkv = nn.Linear(D, 3 * D)
        self.shift = nn.Parameter(torch.randn(D, N))
        self.log_dt = nn.Parameter(torch.empty(H).uniform_(math.log(1e-3), math.log(0.1)))
        self.log_A_real = nn.Parameter(torch.full((H, N // 2), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(N // 2).float().repeat(H, 1))
        self.C = nn.Parameter(torch.randn(H, N // 2, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(H))
        self.out = nn.Linear(D, D)
        for parameter in (self.shift, self.log_dt, self.log_A_real, self.A_imag, self.C, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        u = self._products(long_conv(k, self.shift), v)
        return self._read(q, self._remember(u))

    def prefill(self, x: Tensor, state: H3State | None = None) -> tuple[Tensor, H3State]:
        state = self.init_state(len(x)) if state is None else state
        T = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        keys = torch.cat([state.keys, k], dim=1)
        past = state.keys.shape[1]
        u = self._products(long_conv(keys, self.shift)[:, past:], v)
        # powers: exp(dt A)^t for t = 0..T. What was remembered before is read as the recurrence would read it.
        A, gain = self._poles()
        powers = torch.exp(A[..., None] * torch.arange(T + 1, device=x.device))
        before = torch.view_as_complex(state.memory.contiguous())
        echo = 2 * torch.einsum("bhijn,hnt->bthij", before, gain[..., None] * powers[..., 1:]).real
        memory = torch.einsum("bthij,hnt->bhijn", u.to(powers.dtype), powers[..., :-1].flip(-1))
        memory = memory + before * powers[..., -1][:, None, None]
        y = self._read(q, self._remember(u) + echo.to(u.dtype))
        return y, H3State(keys[:, -past:] if past else keys[:, :0], torch.view_as_real(memory))

    def init_state(self, batch_size: int) -> H3State:
        D, N, K = self.layer.d_model, self.config.d_state, self.config.head_dim
        weight = self.out.weight
        return H3State(
            weight.new_zeros(batch_size, N - 1, D),
            weight.new_zeros(batch_size, D // K, K, K, N // 2, 2, dtype=state_dtype(weight.dtype)),
        )

    def step(self, x_t: Tensor, state: H3State) -> tuple[Tensor, H3State]:
        q, k, v = self.qkv(x_t).chunk(3, dim=-1)
        keys = torch.cat([state.keys, k[:, None]], dim=1)
        shifted = torch.einsum("bnd,dn->bd", keys, self.shift.flip(-1))
        u = self._products(shifted, v)
        A, gain = self._poles()
        before = torch.view_as_complex(state.memory.contiguous())
        memory = before * torch.exp(A)[:, None, None] + u[..., None]
        y = 2 * (memory * gain[:, None, None]).real.sum(-1) + self.D[:, None, None] * u
        return self._read(q, y.to(u.dtype)), H3State(keys[:, 1:], torch.view_as_real(memory))

    def _poles(self) -> tuple[Tensor, Tensor]:
        """dt A and C (exp(dt A) - 1) / A, complex (H, N/2)."""
        dtype = state_dtype(self.C.dtype)
        dt = self.log_dt.to(dtype).exp()[:, None]
        A = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        return dt * A, torch.view_as_complex(self.C.to(dtype)) * (torch.exp(dt * A) - 1) / A

    def _remember(self, u: Tensor) -> Tensor:
        """SSM_diag of u (B, T, H, K, K), from an empty memory."""
        A, gain = self._poles()
        taps = torch.arange(u.shape[1], device=u.device)
        kernel = 2 * torch.einsum("hn,hnt->ht", gain, torch.exp(A[..., None] * taps)).real
        K = self.config.head_dim
        y = long_conv(u.flatten(2), kernel.repeat_interleave(K * K, 0), self.D.repeat_interleave(K * K))
        return y.view(u.shape)

    def _products(self, k: Tensor, v: Tensor) -> Tensor:
        """Keys by values of each head: (..., D), (..., D) -> (..., H, K, K)."""
        K = self.config.head_dim
        return k.unflatten(-1, (-1, K, 1)) * v.unflatten(-1, (-1, 1, K))

    def _read(self, q: Tensor, y: Tensor) -> Tensor:
        """Queries by memory, summed over a head's key channels: (..., D), (..., H, K, K) -> (..., D)."""
        return self.out((q.unflatten(-1, (-1, self.config.head_dim, 1)) * y).sum(-2).flatten(-2))
