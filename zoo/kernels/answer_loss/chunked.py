"""A chunk of rows at a time: its logits live in cache, once for the loss and once again for the gradient.

What is one chunk anyway is left to torch, which has fewer and longer operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zoo.kernels.backend import state_dtype

IGNORE = -100
# Logits that exist at a time: what a CPU core's second-level cache holds, or enough rows to fill a GPU.
CPU_LOGITS = 1 << 19
GPU_LOGITS = 1 << 25


def answer_loss(hidden: Tensor, weight: Tensor, answers: Tensor, predict: bool) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(hidden.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if len(_chunks(hidden, weight)) == 1:
        logits = hidden @ weight.T
        loss = F.cross_entropy(logits, answers, ignore_index=IGNORE, reduction="none")
        return loss, _max(logits.detach())[1] if predict else answers[:0]
    ignored = answers == IGNORE
    loss, prediction = _CrossEntropy.apply(hidden, weight, answers.masked_fill(ignored, 0), predict)
    return loss.masked_fill(ignored, 0), prediction


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy and argmax of every row. The gradient makes the logits again, except the last chunk's: kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, answers: Tensor, predict: bool) -> tuple[Tensor, Tensor]:
        log_sum, at_answer = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))
        prediction = torch.empty_like(answers if predict else answers[:0])
        for rows in _chunks(hidden, weight):
            logits = hidden[rows] @ weight.T
            if predict:
                largest, prediction[rows] = _max(logits)
            else:
                largest = logits.amax(1)
            at_answer[rows] = logits.gather(1, answers[rows, None]).squeeze(1)
            total = logits.sub_(largest[:, None]).exp_().sum(1)
            log_sum[rows] = largest + total.log()
        slope = _slope(logits.div_(total[:, None]), answers[rows])
        ctx.save_for_backward(hidden, weight, answers, log_sum, slope)
        ctx.mark_non_differentiable(prediction)
        return log_sum - at_answer, prediction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, answers, log_sum, slope = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in reversed(_chunks(hidden, weight)):
            if slope is None:
                p = torch.addmm(-log_sum[rows, None], hidden[rows], weight.T).exp_()
                slope = _slope(p, answers[rows])
            d_hidden[rows] = d_loss[rows, None] * (slope @ weight)
            d_weight.addmm_(slope.T, d_loss[rows, None] * hidden[rows])
            slope = None
        return d_hidden, d_weight, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, (GPU_LOGITS if hidden.is_cuda else CPU_LOGITS) // len(weight))
    return [slice(start, start + rows) for start in range(0, max(1, len(hidden)), rows)]


def _slope(p: Tensor, answers: Tensor) -> Tensor:
    """d loss / d logits = p - one_hot(answers), in p's memory."""
    return p.scatter_add_(1, answers[:, None], p.new_full((len(p), 1), -1))


def _max(logits: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """`logits.max(dim=1)`, several times as fast in long rows: a maximum is vectorised, finding its index is not."""
    if logits.shape[1] < 4 * block or logits.shape[1] % block:
        largest, index = logits.max(dim=1)
        return largest, index
    blocks = logits.unflatten(1, (-1, block))
    largest, best = blocks.amax(dim=2).max(dim=1)
    within = blocks[torch.arange(len(logits), device=logits.device), best].argmax(dim=1)
    return largest, best * block + within
