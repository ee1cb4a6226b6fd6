"""S4D: a time-invariant state space model with a diagonal complex state matrix, and the mixer around it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.backend import full_precision
from zoo.kernels.long_conv import long_conv
from zoo.kernels.ssm_kernel import ssm_kernel
from zoo.mixers.base import LayerInfo
from zoo.mixers.recurrent import RecurrentMixer


class DiagonalSSM(nn.Module):
    """x_t = exp(dt A) x_{t-1} + u_t;   y_t = 2 Re(C (exp(dt A) - 1) / A . x_t) + D u_t       (arXiv 2206.11893)

    The system dx/dt = A x + u, y = 2 Re(C x) + D u under zero-order hold, A diagonal, each of its N / 2 complex states
    standing for a conjugate pair. S4D-Lin: A_n = -1/2 + i pi n; dt log-uniform in [0.001, 0.1], C and D normal. Each
    of the H systems runs on R inputs of its own.
    """

    def __init__(self, num_systems: int, d_state: int) -> None:
        super().__init__()
        pairs = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(num_systems).uniform_(math.log(1e-3), math.log(0.1)))
        self.log_A_real = nn.Parameter(torch.full((num_systems, pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(pairs, dtype=torch.float32).repeat(num_systems, 1))
        # Real and imaginary part, each of variance 1/2.
        self.C = nn.Parameter(torch.randn(num_systems, pairs, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(num_systems))
        for parameter in (self.log_dt, self.log_A_real, self.A_imag, self.C):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def init_state(self, batch_size: int, repeats: int = 1) -> Tensor:
        """(B, R, H, N / 2, 2), real and imaginary parts."""
        return self.C.new_zeros(batch_size, repeats, *self.C.shape)

    def kernel(self, length: int) -> Tensor:
        """What the system answers to a single input: the first `length` taps (H, length), without D."""
        # Powers of numbers so close to 1 need fp32.
        with full_precision(self.C):
            return ssm_kernel(self.log_dt, self.log_A_real, self.A_imag, self.C, length)

    def forward(self, u: Tensor, state: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor | None]:
        """u (B, T, R, H), the state before it -> y (B, T, R, H), the state after it."""
        T, R = u.shape[1:3]
        # Powers of numbers so close to 1 need fp32.
        with torch.autocast(u.device.type, enabled=False):
            if T == 1 and state is not None and return_state:
                return self._step(u, state)
            y = long_conv(u.flatten(2), self.kernel(T).repeat(R, 1), self.D.repeat(R)).view_as(u)
            if state is None and not return_state:
                return y, None
            log_decay, C = self._discrete()
            powers_HNt = _powers(log_decay, T + 1)
            if state is not None:
                # Re(w x) = Re(w) Re(x) - Im(w) Im(x).
                weight_HNtc = torch.view_as_real((C[..., None] * powers_HNt[..., 1:]).conj().resolve_conj())
                y = y + 2 * torch.einsum("hntc,brhnc->btrh", weight_HNtc, state).to(y.dtype)
            if not return_state:
                return y, None
            latest_last_HNtc = torch.view_as_real(powers_HNt[..., :T].flip(-1))
            end = torch.einsum("hntc,btrh->brhnc", latest_last_HNtc, u.to(latest_last_HNtc.dtype))
            if state is not None:
                end = end + torch.view_as_real(powers_HNt[..., T] * torch.view_as_complex(state))
            return y, end.contiguous()

    def _step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence itself, of one token."""
        log_decay, C = self._discrete()
        # The input u, which has no imaginary part, is added to the real part of each state.
        end = torch.view_as_real(torch.exp(log_decay) * torch.view_as_complex(state))
        end = end + F.pad(u[:, 0, :, :, None, None].to(end.dtype), (0, 1))
        # Re(w x) = Re(w) Re(x) - Im(w) Im(x).
        weight = torch.view_as_real(C.conj().resolve_conj())
        y = 2 * (weight * end).sum((-2, -1)) + self.D * u[:, 0]
        return y[:, None].to(u.dtype), end

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """dt A and C (exp(dt A) - 1) / A, complex (H, N / 2)."""
        A = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        log_decay = torch.exp(self.log_dt)[:, None] * A
        return log_decay, torch.view_as_complex(self.C) * torch.expm1(log_decay) / A


def _powers(log_base: Tensor, count: int) -> Tensor:
    """exp(log_base)^j for j < count, in a new last axis."""
    return torch.exp(log_base[..., None] * torch.arange(count, device=log_base.device))


class S4DState(NamedTuple):
    """ssm (B, 1, D, N / 2, 2), real and imaginary parts."""

    ssm: Tensor


class S4D(RecurrentMixer):
    """y_t = GLU(W gelu(SSM(x)_t) + b), a system of N states for each channel (arXiv 2206.11893, S4D-Lin).

    Initialised as in the official code: torch's defaults around the SSM.
    """

    class Config(RecurrentMixer.Config):
        d_state: int = Field(64, ge=2, multiple_of=2, description="N, the real numbers that a channel's state holds.")

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        self.ssm = DiagonalSSM(layer.d_model, config.d_state)
        self.out_proj = nn.Linear(layer.d_model, 2 * layer.d_model)

    def init_state(self, batch_size: int) -> S4DState:
        return S4DState(self.ssm.init_state(batch_size))

    def mix(self, x: Tensor, state: S4DState | None, return_state: bool) -> tuple[Tensor, S4DState | None]:
        y, end = self.ssm(x[:, :, None], None if state is None else state.ssm, return_state)
        return F.glu(self.out_proj(F.gelu(y[:, :, 0]))), None if end is None else S4DState(end)
