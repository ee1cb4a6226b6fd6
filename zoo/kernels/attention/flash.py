"""On a GPU: FlashAttention as torch has it (arXiv 2307.08691), windows included; plain torch where it does not apply.

torch's own call has no rule for vmap that holds on all backends, and no window. So this is an op of its own: what a
pack stacks is folded into the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.attention import chunked
from zoo.kernels.launch import fold_batch, rows

# What FlashAttention takes.
DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
HEAD_MULTIPLE = 8


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    return torch.ops.zoo.causal_attention(q, k, v, window, scale)[0]


def applies(q: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention takes these heads."""
    K = q.shape[-1]
    fits = v.shape[-1] == K and K <= LARGEST_HEAD and K % HEAD_MULTIPLE == 0
    return q.is_cuda and q.dtype in DTYPES and fits


@torch.library.custom_op("zoo::causal_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output and, of FlashAttention, the log of the sum of exponentials (B, H, Tq) in fp32."""
    if not applies(q, v):
        o = chunked.causal_attention(q, k, v, window=window, scale=scale)
        return o.contiguous(), q.new_empty(q.shape[0], q.shape[2], 0, dtype=torch.float32)
    o, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        rows(q), rows(k), rows(v), None, None, q.shape[1], k.shape[1], 0.0, True, False,
        scale=scale, window_size_left=_left(window), window_size_right=0,
    )  # fmt: skip
    return o, log_sum


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T if applies(q, v) else 0, dtype=torch.float32)


@torch.library.custom_op("zoo::causal_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
    with _deterministic():
        return torch.ops.aten._flash_attention_backward(
            rows(do), rows(q), rows(k), rows(v), o, log_sum, None, None, q.shape[1], k.shape[1], 0.0, True, unused,
            unused[:0], scale=scale, window_size_left=_left(window), window_size_right=0,
        )  # fmt: skip


@_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _left(window: int | None) -> int:
    """How many keys before its own a query sees, as FlashAttention counts; -1 for all."""
    return -1 if window is None else window - 1


@contextmanager
def _deterministic() -> Iterator[None]:
    """FlashAttention adds up dq in a fixed order."""
    memory: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, log_sum = ctx.saved_tensors
    if applies(q, v):
        gradients = torch.ops.zoo.causal_attention_backward(do, q, k, v, o, log_sum, ctx.window, ctx.scale)
        return *gradients, None, None
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        again = chunked.causal_attention(*leaves, window=ctx.window, scale=ctx.scale)
        return *torch.autograd.grad(again, leaves, do), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
