"""The loss and the prediction at the positions where an answer is asked, without all the logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.errors import UnsupportedError
from zoo.kernels.backend import backend, full_precision
from zoo.kernels.shapes import check_shapes

IMPLS = ("reference", "chunked", "triton")


class AnswerLoss(NamedTuple):
    """loss (M,) in fp32, 0 where the answer is ignored; prediction (M,) int64, the token with the largest logit."""

    loss: Tensor
    prediction: Tensor


def answer_loss(
    hidden: Tensor, weight: Tensor, answers: Tensor, *, predict: bool = True, impl: str | None = None
) -> AnswerLoss:
    """Cross-entropy and argmax of a linear head, row by row.

        logits_m = weight hidden_m
        loss_m = log sum_j exp(logits_mj) - logits_{m, answers_m};  prediction_m = argmax_j logits_mj

    Rows are not averaged: sum the losses and divide by the number of answers. The loss has gradients with respect to
    hidden and weight. Among several largest logits the prediction is any one.

    Args:
        hidden: (M, D).
        weight: (V, D), the head.
        answers: (M,) int64 in [0, V), or -100 for a row to ignore.
        predict: whether the prediction is wanted, which takes time.
        impl: "reference", "chunked", "triton", or None to choose by device.

    Returns:
        loss (M,) in fp32 (fp64 for fp64 hidden), 0 where ignored; prediction (M,) int64, in every row; (0,) where it
        is not wanted.

    Raises:
        UnsupportedError: shapes or the answers' dtype do not fit, or there is no such backend.
    """
    check_shapes("answer_loss", hidden=(hidden, "MD"), weight=(weight, "VD"), answers=(answers, "M"))
    if answers.dtype != torch.int64:
        raise UnsupportedError(f"answer_loss: answers are {answers.dtype}; give torch.int64.")
    module = backend(__name__, IMPLS, impl, hidden.device)
    # Autocast would take the logits in half precision.
    with full_precision(hidden):
        return AnswerLoss(*module.answer_loss(hidden, weight, answers, predict))
