"""One token of a decode in one kernel: the convolution, its activation and the next cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.backend import check_step
from zoo.kernels.early import kernel, wait_for_earlier
from zoo.kernels.launch import Config, check_launch, configured, rows, step_op


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    cache = check_step("short_conv", x.shape[1], initial_state)
    check_launch("short_conv", x, weight, bias)
    bias = None if bias is None else bias[None]
    y, cache = _op(x[:, 0], weight[None], bias, cache.to(x.dtype), activation == "silu")
    return y[:, None] if gate is None else gate * y[:, None], cache


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """x (B, D), weight (G, D, W), bias (G, D), G a divisor of B, cache (B, W-1, D) -> y, cache."""
    B, D = x.shape
    x, weight, cache = rows(x), weight.contiguous(), cache.contiguous()
    y, after = x.new_empty(B, D), torch.empty_like(cache)
    config = configured("short_conv.step", step_config, D)
    step_kernel[(B * triton.cdiv(D, config.block),)](
        x, weight, weight if bias is None else bias.contiguous(), cache, y, after, B // weight.shape[0], x.stride(0),
        D=D, W=weight.shape[2], BLOCK=config.block, HAS_BIAS=bias is not None, SILU=silu,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, after


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), cache.new_empty(cache.shape)


_op = step_op("short_conv_step", _step, _fake)


def step_config(D: int) -> Config:
    block = min(triton.next_power_of_2(D), 256)
    return Config(1, block, max(1, block // 64), 1)


@kernel
def step_kernel(
    x, weight, bias, cache, y, after, share, x_b,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program per sequence and BLOCK channels."""
    wait_for_earlier()
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    b = tl.cast(tl.program_id(0) // blocks, tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = d < D
    channel = b // share * D + d
    cache += b * (W - 1) * D + d
    after += b * (W - 1) * D + d
    now = tl.load(x + b * x_b + d, mask=live, other=0.0)
    total = now.to(tl.float32) * tl.load(weight + channel * W + W - 1, mask=live, other=0.0).to(tl.float32)
    for w in tl.static_range(W - 1):
        past = tl.load(cache + w * D, mask=live, other=0.0)
        total += past.to(tl.float32) * tl.load(weight + channel * W + w, mask=live, other=0.0).to(tl.float32)
        if w > 0:
            tl.store(after + (w - 1) * D, past, mask=live)
    if W > 1:
        tl.store(after + (W - 2) * D, now, mask=live)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y + b * D + d, total.to(y.dtype.element_ty), mask=live)
