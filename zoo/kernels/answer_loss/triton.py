"""The fused head: logits exist a tile at a time, once for the loss and the gradient of hidden, and once for the head's.

The forward pass makes the gradient of hidden: a sum of the head's rows with softmax weights, as attention makes it.
Every tensor of the custom ops has the groups, heads with rows of their own, as its first axis.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.answer_loss import kernels
from zoo.kernels.launch import Config, cast, check_launch, configured, fold_batch, padded, precision, rows
from zoo.kernels.parts import sum_parts

# Enough to occupy a GPU of 132 multiprocessors, and not so many that the parts cost more than they gain.
PROGRAMS = 256
COMBINE_ROWS = 16


def answer_loss(hidden: Tensor, weight: Tensor, answers: Tensor, predict: bool) -> tuple[Tensor, Tensor]:
    check_launch("answer_loss", hidden, weight)
    if hidden.shape[0] == 0:
        # As a sum over no rows, so that the gradients exist.
        return hidden.sum(1).float() + 0 * weight.sum(), answers
    given = (hidden[None], weight[None], answers[None])
    loss, prediction, *_ = torch.ops.zoo.answer_loss(*given, predict, torch.is_grad_enabled())
    return loss.squeeze(0), prediction.squeeze(0)


@torch.library.custom_op("zoo::answer_loss", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, answers: Tensor, predict: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, prediction and, in units of log2, the log of the sum of exponentials, infinite where ignored: (groups, M).

    Then the gradient of the loss with respect to hidden (groups, M, D), and weight as `cast` gives it. What is not
    asked for has no elements.
    """
    groups, M, D = hidden.shape
    V = weight.shape[1]
    # Products are in the dtype of hidden, which is what autocast casts.
    head = cast(weight, hidden.dtype)
    hidden, weight, answers = rows(hidden), rows(head if head.numel() else weight), answers.contiguous()
    config = configured("answer_loss.forward", forward_config, hidden)
    blocks = groups * triton.cdiv(M, config.chunk)
    steps, parts = _split(blocks, triton.cdiv(V, config.block))
    numbers = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    largest, total = numbers(2, parts, groups, M)
    best = torch.empty(parts, groups, M, dtype=torch.int32, device=hidden.device)
    # Where it is not asked for, any tensor stands in: it is not written.
    pull = numbers(parts, groups, M, D) if gradient else largest
    slope = hidden.new_empty(groups, M if gradient else 0, D)
    loss, log_sum = (numbers(groups, M) for _ in range(2))
    prediction = answers.new_empty(groups, M if predict else 0)
    strides = (*hidden.stride()[:2], *weight.stride()[:2])
    sizes = {"D": D, "BLOCK_D": _channels(hidden), "GRADIENT": gradient, "PREDICT": predict}
    strips = triton.cdiv(D, _channels(hidden)) if gradient else 1
    kernels.forward_kernel[(blocks * parts * strips,)](
        hidden, weight, answers, largest, total, best, pull, M, V, groups * M, steps, parts, *strides,
        ROWS=config.chunk, COLUMNS=config.block, EVEN=V % config.block == 0, PRECISION=precision(hidden),
        num_warps=config.num_warps, num_stages=config.num_stages, **sizes,
    )  # fmt: skip
    kernels.combine_kernel[(triton.cdiv(groups * M, COMBINE_ROWS),)](
        hidden, weight, largest, total, best, pull, answers, loss, log_sum, prediction, slope, M, groups * M, parts,
        *strides, ROWS=COMBINE_ROWS, **sizes,
    )  # fmt: skip
    return loss, prediction, log_sum, slope, head


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, answers: Tensor, predict: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups, M, D = hidden.shape
    loss, log_sum = (hidden.new_empty(groups, M, dtype=torch.float32) for _ in range(2))
    prediction = answers.new_empty(groups, M if predict else 0)
    return loss, prediction, log_sum, hidden.new_empty(groups, M if gradient else 0, D), cast(weight, hidden.dtype)


@torch.library.custom_op("zoo::answer_loss_backward", mutates_args=())
def _backward(
    hidden: Tensor, weight: Tensor, answers: Tensor, log_sum: Tensor, slope: Tensor, head: Tensor, dloss: Tensor
) -> tuple[Tensor, Tensor]:
    groups, M, D = hidden.shape
    V = weight.shape[1]
    hidden, head, dloss = rows(hidden), rows(head if head.numel() else weight), dloss.contiguous()
    config = configured("answer_loss.backward", backward_config, hidden)
    blocks = groups * triton.cdiv(V, config.chunk)
    steps, parts = _split(blocks, triton.cdiv(M, config.block))
    dweight = torch.empty(parts, groups, V, D, dtype=torch.float32, device=weight.device)
    kernels.backward_kernel[(blocks * parts * triton.cdiv(D, _channels(hidden)),)](
        hidden, head, answers.contiguous(), log_sum, dloss, dweight, M, V, groups, steps, parts,
        *hidden.stride()[:2], *head.stride()[:2],
        D=D, BLOCK_D=_channels(hidden), ROWS=config.chunk, COLUMNS=config.block, EVEN=M % config.block == 0,
        PRECISION=precision(hidden), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    dhidden = torch.empty_like(slope)
    kernels.scale_kernel[(triton.cdiv(groups * M, COMBINE_ROWS),)](
        slope, dloss, dhidden, groups * M, D=D, BLOCK_D=triton.next_power_of_2(D), ROWS=COMBINE_ROWS
    )
    return dhidden, sum_parts(dweight[None], weight.dtype).squeeze(0)


@_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, answers: Tensor, log_sum: Tensor, slope: Tensor, head: Tensor, dloss: Tensor
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    # Of zeros for what has no gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output[2:])


def _gradients(ctx: Any, dloss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.zoo.answer_loss_backward(*ctx.saved_tensors, dloss), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)


def _channels(hidden: Tensor) -> int:
    """Channels of a tile: all, where as many fit."""
    D, most = hidden.shape[-1], {torch.float32: 128, torch.float16: 256}.get(hidden.dtype, 512)
    return padded(D) if most >= D else min(most, 256)


def forward_config(hidden: Tensor) -> Config:
    """chunk: rows that a program keeps; block: rows of the other side that it meets at a time."""
    D = hidden.shape[-1]
    if hidden.dtype == torch.float32:
        return Config(chunk=32, block=32, num_warps=4, num_stages=1)
    if D <= 64:
        return Config(chunk=64, block=64, num_warps=4, num_stages=3)
    if D <= 128:
        return Config(chunk=64, block=128, num_warps=4, num_stages=2)
    return Config(chunk=64, block=64, num_warps=4 if D <= 256 else 8, num_stages=2 if _channels(hidden) >= D else 1)


def backward_config(hidden: Tensor) -> Config:
    if hidden.dtype == torch.bfloat16 and hidden.shape[-1] <= 64:
        return Config(chunk=128, block=64, num_warps=4, num_stages=2)
    return forward_config(hidden)


def _split(blocks: int, steps: int) -> tuple[int, int]:
    """Steps of a part, and parts, so that there are about PROGRAMS programs."""
    each = triton.cdiv(steps, min(steps, max(1, PROGRAMS // blocks)))
    return each, triton.cdiv(steps, each)
