"""The definition: all logits, then torch's cross-entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.backend import state_dtype


def answer_loss(hidden: Tensor, weight: Tensor, answers: Tensor, predict: bool) -> tuple[Tensor, Tensor]:
    """-log softmax(weight hidden)[answer], and the argmax. See `zoo.kernels.answer_loss`."""
    accumulate = state_dtype(hidden.dtype)
    logits = hidden.to(accumulate) @ weight.to(accumulate).T
    loss = F.cross_entropy(logits, answers, ignore_index=-100, reduction="none")
    return loss, logits.detach().argmax(dim=-1) if predict else answers[:0]
