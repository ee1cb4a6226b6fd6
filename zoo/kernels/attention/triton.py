"""Attention to a few hundred keys at most: one pass over memory forward and two back, where FlashAttention needs more.

Every tensor of the custom ops has the batch as its first axis, into which vmap folds a pack.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.attention import kernels
from zoo.kernels.launch import DTYPES, Config, check_launch, configured, fold_batch, padded, precision, rows

# Keys that a query sees; with more, FlashAttention is faster.
MOST_KEYS = 256
LARGEST_HEAD = 128


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these heads: queries with a key and a value each, in 16 or 32 bits."""
    return q.shape == k.shape == v.shape and q.shape[-1] <= LARGEST_HEAD and v.dtype in DTYPES


def is_faster(q: Tensor, window: int | None) -> bool:
    """Whether they are faster than FlashAttention, as measured in bf16."""
    few = q.shape[1] <= MOST_KEYS or (window is not None and window <= MOST_KEYS)
    return few and q.dtype == torch.bfloat16


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    dtype = check_launch("causal_attention", q, k, v)
    if not takes(q, k, v):
        raise UnsupportedError(
            f"causal_attention: the Triton backend takes q, k and v of one shape and at most {LARGEST_HEAD} channels, "
            f"not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; pass impl='flash'."
        )
    T = q.shape[1]
    given = (x.to(dtype) for x in (q, k, v))
    o, _ = torch.ops.zoo.near_attention(*given, T if window is None else min(window, T), scale)
    return o.to(v.dtype)


@torch.library.custom_op("zoo::near_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """The output and, in units of log2, the log of the sum of exponentials (B, T, H) in fp32."""
    o, log_sum = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch(kernels.forward_kernel, configured("attention.forward", config_of, q), (q, k, v, o, log_sum), window, scale)
    return o, log_sum


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("zoo::near_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, do: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(o) for _ in range(3))
    do, delta = do.contiguous(), torch.empty_like(log_sum)
    config = configured("attention.query", config_of, q)
    _launch(kernels.query_kernel, config, (q, k, v, o, log_sum, do, dq, delta), window, scale)
    config = configured("attention.key", config_of, q)
    _launch(kernels.key_kernel, config, (q, k, v, log_sum, do, delta, dk, dv), window, scale)
    return dq, dk, dv


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, do: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _launch(kernel: Any, config: Config, tensors: tuple[Tensor, ...], window: int, scale: float) -> None:
    """One program a sequence, head and block of config.block tokens. tensors: q, k and v, and what `kernel` takes."""
    B, T, H, K = tensors[0].shape
    if tensors[0].numel() == 0:
        return
    q, k, v = (rows(x) for x in tensors[:3])
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    kernel[(B * H * triton.cdiv(T, config.block),)](
        q, k, v, *tensors[3:], T, H, window, scale, *strides,
        K=K, BLOCK_K=padded(K), BLOCK=config.block, PRECISION=precision(q),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def config_of(q: Tensor) -> Config:
    """block: queries, and keys, at a time; chunk is unused."""
    if q.dtype == torch.float32:
        return Config(chunk=1, block=32, num_warps=4, num_stages=1)
    return Config(chunk=1, block=64, num_warps=4, num_stages=2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.zoo.near_attention_backward(*ctx.saved_tensors, do, ctx.window, ctx.scale)
    return *gradients, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
