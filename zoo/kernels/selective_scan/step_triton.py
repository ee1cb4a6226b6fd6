"""One token of a decode in one kernel: the state is read once and the next one written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.activation import activation
from zoo.kernels.backend import check_step
from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.launch import Config, check_launch, configured, rows, step_op


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
) -> tuple[Tensor, Tensor]:
    h = check_step("selective_scan", x.shape[1], initial_state)
    check_launch("selective_scan", x)
    if dt_bias is not None:
        dt = activation(dt, dt_bias, "softplus")
    # What is the same for every sequence has one sequence, or one for each model under vmap; B and C always (G, 1, N).
    dt = dt[:, 0] if dt.dim() == 3 else dt[None]
    B, C = (M if M.dim() == 3 else M[None] for M in (B, C))
    D, z = None if D is None else D[None], None if z is None else z[:, 0]
    y, h = _op(x[:, 0], dt, A[None], B, C, D, z, h.float())
    return y[:, None], h


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """x, z (B, D), dt, D (G, D), A (G, D, N), B, C (G, D or 1, N), h (B, D, N), each G a divisor of B -> y, h."""
    batch, channels, N = h.shape
    x, dt, A, B, C, h = rows(x), rows(dt), A.contiguous(), rows(B), rows(C), h.contiguous()
    skip, gate = x if D is None else rows(D), x if z is None else rows(z)
    y, after = x.new_empty(x.shape), torch.empty_like(h)
    config = configured("selective_scan.step", step_config, channels, N)
    shares = [batch // t.shape[0] for t in (dt, A, B, C, skip)]
    step_kernel[(batch * triton.cdiv(channels, config.block),)](
        x, dt, A, B, C, skip, gate, h, y, after, *shares,
        x.stride(0), dt.stride(0), B.stride(0), C.stride(0), skip.stride(0), gate.stride(0),
        CHANNELS=channels, N=N, BLOCK=config.block, BLOCK_N=triton.next_power_of_2(N),
        B_D=B.stride(1) if B.shape[1] > 1 else 0, C_D=C.stride(1) if C.shape[1] > 1 else 0,
        HAS_D=D is not None, HAS_Z=z is not None, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, after


def _fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), h.new_empty(h.shape)


_op = step_op("selective_scan_step", _step, _fake)


def step_config(channels: int, N: int) -> Config:
    return Config(1, min(triton.next_power_of_2(channels), max(1, 1024 // triton.next_power_of_2(N))), 2, 1)


@kernel
def step_kernel(
    x, dt, A, B, C, skip, gate, h, y, after, dt_share, A_share, B_share, C_share, skip_share,
    x_b, dt_b, B_b, C_b, skip_b, gate_b,
    CHANNELS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    B_D: tl.constexpr, C_D: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """One program per sequence and BLOCK channels."""
    wait_for_earlier()
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    b = tl.cast(tl.program_id(0) // blocks, tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    live = d < CHANNELS
    at = d[:, None] * N + n[None, :]
    inside = live[:, None] & (n < N)[None, :]
    now = tl.load(h + b * CHANNELS * N + at, mask=inside, other=0.0)
    b_A = tl.load(A + b // A_share * CHANNELS * N + at, mask=inside, other=0.0).to(tl.float32)
    b_x = tl.load(x + b * x_b + d, mask=live, other=0.0).to(tl.float32)
    b_dt = tl.load(dt + b // dt_share * dt_b + d, mask=live, other=0.0).to(tl.float32)
    write = (b_dt * b_x)[:, None] * load_terms(B + b // B_share * B_b, d, n, live, N, B_D)
    now = tl.exp(b_dt[:, None] * b_A) * now + write
    tl.store(after + b * CHANNELS * N + at, now, mask=inside)
    total = tl.sum(now * load_terms(C + b // C_share * C_b, d, n, live, N, C_D), 1)
    if HAS_D:
        total += tl.load(skip + b // skip_share * skip_b + d, mask=live, other=0.0).to(tl.float32) * b_x
    if HAS_Z:
        b_z = tl.load(gate + b * gate_b + d, mask=live, other=0.0).to(tl.float32)
        total *= b_z * tl.sigmoid(b_z)
    tl.store(y + b * CHANNELS + d, total.to(y.dtype.element_ty), mask=live)


@triton.jit
def load_terms(M, d, n, live, N: tl.constexpr, M_D: tl.constexpr):
    """B or C: a row for all channels, or one for each."""
    if M_D == 0:
        return tl.load(M + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.load(M + d[:, None] * M_D + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0).to(
            tl.float32
        )
