"""The recurrence chunk by chunk, all channels at once, with the gradient written out.

A diagonal decay that differs by channel and state allows no matmul over time, so the work is T B D N exponentials and
multiply-adds, and a CPU is bound by how often it touches them. Forward keeps one state a chunk; backward computes a
chunk's states again while they fit in cache, then runs the adjoint recurrence over them. Against the same recurrence
under autograd that is four times as fast or more, and the memory is that of a chunk, not of the sequence. Where the
sequence is one chunk, its states are kept.

Letters: c steps of a chunk (time first: each step is one contiguous block), B batch, N states, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels.backend import state_dtype

CHUNK_ELEMENTS = 1 << 20
MIN_CHUNK = 8


def _outer(M: Tensor, v_cBD: Tensor, out: Tensor) -> Tensor:
    """M_n v_d for each step: M is (c, B, N), or (N, D) for the same at each token."""
    return torch.mul(M[..., None] if M.dim() == 3 else M, v_cBD[:, :, None], out=out)


def _over_states(M: Tensor, X_cBND: Tensor) -> Tensor:
    """sum_n M_n X_nd for each step: (c, B, D)."""
    return torch.matmul(M[:, :, None], X_cBND).squeeze(2) if M.dim() == 3 else (M * X_cBND).sum(2)


def _gradient(M: Tensor, X_cBND: Tensor, v_cBD: Tensor) -> Tensor:
    """The gradient of _outer to M, in M's shape: sum_d X_nd v_d for each step, or X_nd v_d summed over all steps."""
    if M.dim() == 3:
        return torch.matmul(v_cBD[:, :, None], X_cBND.mT).squeeze(2)
    return (X_cBND * v_cBD[:, :, None]).sum((0, 1))


def _part(M: Tensor, chunk: slice) -> Tensor:
    return M[chunk] if M.dim() == 3 else M


def _decays_and_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor, decays: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """exp(dt_t A) and h_t for each step of a chunk, in memory that is given; h is the state before it."""
    E = _outer(A, dt, out=decays[: len(x)]).exp_()
    H = _outer(B, x * dt, out=states[: len(x)])
    for E_t, H_t in zip(E.unbind(0), H.unbind(0), strict=True):
        h = H_t.addcmul_(E_t, h)
    return E, H


class _Scan(torch.autograd.Function):
    """x, dt (T, B, D), A (N, D), B, C (T, B, N) or (N, D), h (B, N, D) -> y (T, B, D), h after the last step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        T = len(x)
        ctx.length = min(T, max(MIN_CHUNK, CHUNK_ELEMENTS // h.numel()))
        if ctx.length == T:
            E, H = _decays_and_states(x, dt, A, B, h, *(h.new_empty(T, *h.shape) for _ in range(2)))
            ctx.save_for_backward(x, dt, A, B, C, h, E, H)
            return _over_states(C, H), H[-1].clone()
        y = torch.empty_like(x)
        buffer = h.new_empty(ctx.length, *h.shape)
        starts = []
        for start in range(0, T, ctx.length):
            chunk = slice(start, start + ctx.length)
            starts.append(h)
            u, B_c = x[chunk] * dt[chunk], _part(B, chunk)
            H = _outer(A, dt[chunk], out=buffer[: len(u)]).exp_()
            for t in range(len(u)):
                # Each step's decay is overwritten by its state.
                B_t = B_c[t, ..., None] if B.dim() == 3 else B_c
                h = H[t].mul_(h).addcmul_(B_t, u[t, :, None])
            y[chunk] = _over_states(_part(C, chunk), H)
            h = h.clone()
        ctx.save_for_backward(x, dt, A, B, C, *starts)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, *starts = ctx.saved_tensors
        whole = ctx.length == len(x)
        if whole:
            *starts, E, H = starts
        dy = dy.contiguous()
        du, ddt = torch.empty_like(x), torch.empty_like(x)
        dA, dB, dC = (torch.zeros_like(M) for M in (A, B, C))
        slopes, *buffers = (dh.new_empty(ctx.length, *dh.shape) for _ in range(2 if whole else 3))
        g = dh
        for i in reversed(range(len(starts))):
            chunk = slice(i * ctx.length, (i + 1) * ctx.length)
            dt_c, dy_c, B_c, C_c = dt[chunk], dy[chunk], _part(B, chunk), _part(C, chunk)
            u = x[chunk] * dt_c
            if not whole:
                E, H = _decays_and_states(x[chunk], dt_c, A, B_c, starts[i], *buffers)
            _part(dC, chunk).add_(_gradient(C_c, H, dy_c))
            # G_t = dL/dh_t, and D_t = E_t G_t, which the step before receives. D overwrites E where that is not kept.
            G, D = _outer(C_c, dy_c, out=slopes[: len(u)]), buffers[0][: len(u)]
            for D_t, E_t, G_t in zip(*(X.unbind(0)[::-1] for X in (D, E, G)), strict=True):
                g = torch.mul(E_t, G_t.add_(g), out=D_t)
            g = g.clone()
            du[chunk] = _over_states(B_c, G)
            _part(dB, chunk).add_(_gradient(B_c, G, u))
            # D becomes dL/d(dt A).
            D[0].mul_(starts[i])
            D[1:].mul_(H[:-1])
            dA.add_(torch.mul(D, dt_c[:, :, None], out=G).sum((0, 1)))
            ddt[chunk] = D.mul_(A).sum(2)
        return du * dt, ddt.addcmul_(du, x), dA, dB, dC, g


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, _, channels = x.shape
    dtype = state_dtype(x.dtype)
    u = x.to(dtype)
    if dt_bias is not None:
        dt = F.softplus(dt.to(dtype) + dt_bias.to(dtype))

    def time_first(M: Tensor) -> Tensor:
        return M.to(dtype).transpose(0, 1).contiguous()

    if initial_state is None:
        start = u.new_zeros(batch, A.shape[1], channels)
    else:
        start = initial_state.to(dtype).mT.contiguous()
    y, end = _Scan.apply(
        time_first(x), time_first(dt.expand_as(x)), A.to(dtype).T.contiguous(), time_first(B), time_first(C), start
    )
    y = y.transpose(0, 1)
    if D is not None:
        y = torch.addcmul(y, u, D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), end.mT.contiguous() if return_state else None
