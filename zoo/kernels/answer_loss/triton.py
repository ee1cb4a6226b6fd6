"""The fused head: logits exist a tile at a time, in the forward and, made again, in both gradients.

Every tensor of the custom ops has the groups, heads with rows of their own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.answer_loss import kernels
from zoo.kernels.launch import Config, check_launch, configured, fold_batch, padded, precision, rows
from zoo.kernels.parts import sum_parts

# Enough to occupy a GPU of 132 multiprocessors, and not so many that the parts cost more than they gain.
PROGRAMS = 256
COMBINE_ROWS = 16


def answer_loss(hidden: Tensor, weight: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    check_launch("answer_loss", hidden, weight)
    if hidden.shape[0] == 0:
        # As a sum over no rows, so that the gradients exist.
        return hidden.sum(1).float() + 0 * weight.sum(), answers
    loss, prediction, _ = torch.ops.zoo.answer_loss(hidden[None], weight[None], answers[None])
    return loss.squeeze(0), prediction.squeeze(0)


@torch.library.custom_op("zoo::answer_loss", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, prediction and, in units of log2, the log of the sum of exponentials: (groups, M)."""
    groups, M, D = hidden.shape
    V = weight.shape[1]
    # Products are in the dtype of hidden, which is what autocast casts.
    hidden, weight = rows(hidden), rows(weight.to(hidden.dtype))
    config = configured("answer_loss.forward", forward_config, hidden)
    blocks = groups * triton.cdiv(M, config.chunk)
    steps, parts = _split(blocks, triton.cdiv(V, config.block))
    largest, total = torch.empty(2, parts, groups, M, dtype=torch.float32, device=hidden.device)
    best = torch.empty(parts, groups, M, dtype=torch.int32, device=hidden.device)
    strides = (*hidden.stride()[:2], *weight.stride()[:2])
    kernels.forward_kernel[(blocks * parts,)](
        hidden, weight, largest, total, best, M, V, groups * M, steps, parts, *strides,
        D=D, BLOCK_D=_channels(hidden), ROWS=config.chunk, COLUMNS=config.block, EVEN=V % config.block == 0,
        PRECISION=precision(hidden), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    loss, log_sum = (torch.empty(groups, M, dtype=torch.float32, device=hidden.device) for _ in range(2))
    prediction = torch.empty_like(answers, memory_format=torch.contiguous_format)
    kernels.combine_kernel[(triton.cdiv(groups * M, COMBINE_ROWS),)](
        hidden, weight, largest, total, best, answers.contiguous(), loss, log_sum, prediction, M, groups * M, parts,
        *strides, D=D, BLOCK_D=_channels(hidden), ROWS=COMBINE_ROWS,
    )  # fmt: skip
    return loss, prediction, log_sum


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, log_sum = (hidden.new_empty(answers.shape, dtype=torch.float32) for _ in range(2))
    return loss, answers.new_empty(answers.shape), log_sum


@torch.library.custom_op("zoo::answer_loss_backward", mutates_args=())
def _backward(hidden: Tensor, weight: Tensor, answers: Tensor, log_sum: Tensor, dloss: Tensor) -> tuple[Tensor, Tensor]:
    groups, M, D = hidden.shape
    V = weight.shape[1]
    hidden, head = rows(hidden), rows(weight.to(hidden.dtype))
    config = configured("answer_loss.backward", backward_config, hidden)
    hidden_blocks, weight_blocks = triton.cdiv(M, config.chunk), triton.cdiv(V, config.chunk)
    hidden_steps, hidden_parts = _split(groups * hidden_blocks, triton.cdiv(V, config.block))
    weight_steps, weight_parts = _split(groups * weight_blocks, triton.cdiv(M, config.block))

    def parts(number: int, like: Tensor) -> Tensor:
        dtype = like.dtype if number == 1 else torch.float32
        return torch.empty(number, *like.shape, dtype=dtype, device=like.device)

    dhidden, dweight = parts(hidden_parts, hidden), parts(weight_parts, weight)
    programs = hidden_blocks * hidden_parts + weight_blocks * weight_parts
    kernels.backward_kernel[(groups * programs * triton.cdiv(D, _channels(hidden)),)](
        hidden, head, answers.contiguous(), log_sum, dloss.contiguous(), dhidden, dweight, M, V, groups,
        hidden_steps, hidden_parts, weight_steps, weight_parts, *hidden.stride()[:2], *head.stride()[:2],
        D=D, BLOCK_D=_channels(hidden), ROWS=config.chunk, COLUMNS=config.block, PRECISION=precision(hidden),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return sum_parts(dhidden[None], hidden.dtype).squeeze(0), sum_parts(dweight[None], weight.dtype).squeeze(0)


@_backward.register_fake
def _(hidden: Tensor, weight: Tensor, answers: Tensor, log_sum: Tensor, dloss: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(*inputs, output[2])


def _gradients(ctx: Any, dloss: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, None]:
    hidden, weight, answers, log_sum = ctx.saved_tensors
    return *torch.ops.zoo.answer_loss_backward(hidden, weight, answers, log_sum, dloss), None


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
    if D <= 128:
        return Config(chunk=64, block=128, num_warps=4, num_stages=2 if D <= 64 else 3)
    return Config(chunk=64, block=64, num_warps=4 if D <= 256 else 8, num_stages=2 if _channels(hidden) >= D else 1)


def backward_config(hidden: Tensor) -> Config:
    """As the forward, which has no accumulator as wide as hidden, but with narrower blocks where that is wide."""
    config = forward_config(hidden)
    return config._replace(block=64, num_stages=2) if hidden.shape[-1] > 64 and config.block > 64 else config


def _split(blocks: int, steps: int) -> tuple[int, int]:
    """Steps of a part, and parts, so that there are about PROGRAMS programs."""
    each = triton.cdiv(steps, min(steps, max(1, PROGRAMS // blocks)))
    return each, triton.cdiv(steps, each)
