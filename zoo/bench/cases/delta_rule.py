"""delta_rule without a decay and with one per step and per channel; the generalised rule as RWKV-7 has it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from zoo.bench.case import Case, Cost, Draw, Op, Shape, register
from zoo.kernels.delta_rule import delta_rule, generalized_delta_rule
from zoo.kernels.launch import Config
from zoo.mixers.rwkv7 import MIN_DECAY


def _delta_inputs(shape: Shape, draw: Draw, decay: str) -> dict[str, Any]:
    B, T, H, D = shape
    inputs = {"q": draw.normal(B, T, H, D, scale=D**-0.5), "k": _unit(draw, shape), "v": draw.normal(B, T, H, D)}
    inputs["beta"] = draw.normal(B, T, H).detach().sigmoid().requires_grad_()
    if decay:
        inputs["decay"] = draw.log_decay(*{"step": (B, T, H), "channel": (B, T, H, D)}[decay])
    return inputs


def _rwkv7_inputs(shape: Shape, draw: Draw) -> dict[str, Any]:
    inputs = {"q": draw.normal(*shape), "k": draw.normal(*shape, scale=shape.D**-0.5), "v": draw.normal(*shape)}
    kappa = _unit(draw, shape).detach()
    inputs["a"] = (-kappa).requires_grad_()
    inputs["b"] = (kappa * draw.normal(*shape).detach().sigmoid()).requires_grad_()
    inputs["decay"] = (MIN_DECAY * draw.normal(*shape).detach().float().sigmoid()).requires_grad_()
    return inputs


def _unit(draw: Draw, shape: Shape) -> Tensor:
    return F.normalize(draw.normal(*shape).detach(), dim=-1).requires_grad_()


def _forward(shape: Shape, vectors: int, decays: str) -> Cost:
    """`vectors` of D channels a token, the output included, beside decays and beta."""
    tokens = shape.B * shape.T * shape.H
    return Cost(
        (vectors * shape.D + 1) * tokens, _decays(shape, decays) * tokens, 2 * (vectors - 1) * tokens * shape.D**2
    )


def _both(shape: Shape, vectors: int, decays: str) -> Cost:
    tokens, forward = shape.B * shape.T * shape.H, _forward(shape, vectors, decays)
    # Once more all inputs, the gradient of the output, and the gradients of the inputs.
    return Cost((vectors + 2 * vectors - 1) * shape.D * tokens + 3 * tokens, 3 * forward.words, 3 * forward.flops)


def _decays(shape: Shape, decay: str) -> int:
    return {"": 0, "step": 1, "channel": shape.D}[decay]


def _delta_net() -> Op:
    from fla.ops.delta_rule import chunk_delta_rule

    return lambda q, k, v, beta: chunk_delta_rule(q, k, v, beta, scale=1.0)[0]


def _gated_delta_net() -> Op:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return lambda q, k, v, beta, decay: chunk_gated_delta_rule(q, k, v, decay, beta, scale=1.0)[0]


def _rwkv7() -> Op:
    from fla.ops.rwkv7 import chunk_rwkv7

    return lambda q, k, v, a, b, decay: chunk_rwkv7(q, decay, k, v, a, b, scale=1.0)[0]


def _rwkv7_bounded() -> Op:
    from fla.ops.rwkv7 import chunk_rwkv7

    return lambda q, k, v, a, b, decay: chunk_rwkv7(q, decay, k, v, a, b, scale=1.0, lower_bound=MIN_DECAY)[0]


def _configs(shape: Shape, op: str) -> dict[str, list[Config]]:
    tried = ["32 32 2 1", "32 32 2 2", "32 32 2 3", "32 16 1 2", "32 16 1 3", "32 64 4 2", "16 32 2 2", "16 16 1 2"]
    walks = [Config(*map(int, c.split())) for c in tried]
    chunks = [Config(0, block, num_warps, 1) for num_warps in (1, 2, 4, 8) for block in (32, 64)]
    kernels = {"forward": walks, "backward": walks, "prepare": chunks[::2], "chunks_backward": chunks}
    return {f"{op}.{kernel}": configs for kernel, configs in kernels.items()}


for _name, _decay, _peers in (
    ("delta_net", "", {"fla chunk_delta_rule": _delta_net}),
    ("gated_delta_net", "step", {"fla chunk_gated_delta_rule": _gated_delta_net}),
    ("channel_decay", "channel", {}),
):
    register(
        Case(
            name=f"delta_rule.{_name}",
            tolerance="delta_rule",
            inputs=partial(_delta_inputs, decay=_decay),
            ours=partial(delta_rule, impl="triton", return_state=False),
            reference=partial(delta_rule, impl="chunked", return_state=False),
            torch=partial(delta_rule, impl="chunked", return_state=False),
            forward=partial(_forward, vectors=4, decays=_decay),
            both=partial(_both, vectors=4, decays=_decay),
            peers=_peers,
            configs=partial(_configs, op="generalized_delta_rule" if _decay == "channel" else "delta_rule"),
        )
    )
register(
    Case(
        name="generalized_delta_rule.rwkv7",
        tolerance="generalized_delta_rule",
        inputs=_rwkv7_inputs,
        ours=partial(generalized_delta_rule, impl="triton", return_state=False, min_decay=MIN_DECAY),
        reference=partial(generalized_delta_rule, impl="chunked", return_state=False),
        torch=partial(generalized_delta_rule, impl="chunked", return_state=False, min_decay=MIN_DECAY),
        forward=partial(_forward, vectors=6, decays="channel"),
        both=partial(_both, vectors=6, decays="channel"),
        peers={"fla chunk_rwkv7": _rwkv7, "fla chunk_rwkv7, bounded": _rwkv7_bounded},
        configs=partial(_configs, op="generalized_delta_rule"),
    )
)
