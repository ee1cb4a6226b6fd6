"""answer_loss over a vocabulary of 8192: B sequences of T questions, a quarter of them ignored; H * D channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from zoo.bench.case import MANY_HEADS, Case, Cost, Draw, Op, Shape, register
from zoo.kernels.answer_loss import answer_loss
from zoo.kernels.launch import Config

V = 8192
SHAPES = tuple(Shape(256, Q, 1, 64) for Q in (64, 16, 4)) + tuple(Shape(256, Q, 2, 64) for Q in (64, 16, 4))
SHAPES += (Shape(256, 64, 4, 64), Shape(256, 16, 8, 64), Shape(64, 16, 12, 64), Shape(64, 16, 16, 64))


def _inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    B, Q, H, D = shape
    answers = draw.integers(-V // 3, V, B, Q)
    return {
        "hidden": draw.normal(B, Q, H * D),
        "weight": draw.normal(V, H * D, scale=(H * D) ** -0.5),
        "answers": answers.where(answers >= 0, -100),
    }


def _loss(hidden: Tensor, weight: Tensor, answers: Tensor, impl: str) -> Tensor:
    loss, _ = answer_loss(hidden.flatten(0, 1), weight, answers.flatten(), predict=False, impl=impl)
    return loss.view(answers.shape)


def _least(shape: Shape, passes: int) -> Cost:
    """Logits once forward; once more backward, with a product for each gradient."""
    rows, width = shape.B * shape.T, shape.H * shape.D
    return Cost((rows + V) * width * passes, 2 * rows, {1: 1, 3: 4}[passes] * 2 * rows * V * width)


def _torch(hidden: Tensor, weight: Tensor, answers: Tensor) -> Tensor:
    logits = F.linear(hidden.flatten(0, 1), weight)
    return F.cross_entropy(logits, answers.flatten(), reduction="none").view(answers.shape)


def _linear_cross_entropy() -> Op:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("this torch has no linear_cross_entropy")

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, answers: Tensor) -> Tensor:
        loss = F.linear_cross_entropy(hidden.flatten(0, 1), weight, answers.flatten(), reduction="none")
        return loss.view(answers.shape)

    return linear_cross_entropy


def _fla() -> Op:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    def mean(hidden: Tensor, weight: Tensor, answers: Tensor) -> Tensor:
        return fused_linear_cross_entropy_loss(hidden.flatten(0, 1), answers.flatten(), weight)

    return mean


def _configs(shape: Shape) -> dict[str, list[Config]]:
    tried = [
        "64 128 4 2",
        "32 128 4 2",
        "32 64 2 3",
        "64 64 2 3",
        "64 128 4 3",
        "128 128 8 3",
        "64 64 4 2",
        "32 256 8 2",
    ]
    configs = [Config(*map(int, c.split())) for c in tried]
    return {"answer_loss.forward": configs, "answer_loss.backward": configs}


register(
    Case(
        name="answer_loss",
        tolerance="answer_loss",
        inputs=_inputs,
        ours=partial(_loss, impl="triton"),
        reference=partial(_loss, impl="chunked"),
        torch=_torch,
        forward=partial(_least, passes=1),
        both=partial(_least, passes=3),
        peers={"torch linear_cross_entropy": _linear_cross_entropy, "fla fused_linear_cross_entropy": _fla},
        shapes=SHAPES,
        # 2^31 elements of hidden would have 2^42 logits.
        large=(MANY_HEADS,),
        configs=_configs,
    )
)
