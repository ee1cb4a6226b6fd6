"""Gate and norm in one pass over memory, all gradients in another.

Every tensor of the custom ops has the groups, each with weights of its own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.gated_norm import kernels
from zoo.kernels.launch import Config, check_launch, configured, empty_like, fold_batch, rows, split_rows
from zoo.kernels.parts import sum_all

# Programs: enough to keep the memory of a GPU busy, and, where each leaves a sum of its own, not many more.
PROGRAMS = 16384
SUMMING_PROGRAMS = 1024


def gated_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    gate_first: bool,
    scale: float,
    eps: float,
) -> Tensor:
    check_launch("gated_norm", x, gate, weight, bias)
    if x.numel() == 0:
        return x
    weights = (weight, bias)
    heads = max([1, *(len(w) for w in weights if w is not None and w.dim() == 2)])
    tokens = (None if t is None else t.reshape(1, -1, *t.shape[2:]) for t in (x, gate))
    by_head = (None if w is None else w.expand(heads, -1)[None] for w in weights)
    return torch.ops.zoo.gated_norm(*tokens, *by_head, kind == "rms", gate_first, scale, eps).view(x.shape)


@torch.library.custom_op("zoo::gated_norm", mutates_args=())
def _forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    gate_first: bool,
    scale: float,
    eps: float,
) -> Tensor:
    """x and gate (groups, M, H, V), weights (groups, H or 1, V)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensors, strides, options = _prepared((x, gate), (weight, bias), rms, gate_first)
    programs, launch = _launch(x, options["HEADS"], configured("gated_norm.forward", config_of, x), PROGRAMS)
    kernels.forward_kernel[(programs,)](*tensors, y, *launch.pop("split"), scale, eps, *strides, **options, **launch)
    return y


@_forward.register_fake
def _(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    gate_first: bool,
    scale: float,
    eps: float,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::gated_norm_backward", mutates_args=())
def _backward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    rms: bool,
    gate_first: bool,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all tensors but dy; of those that are None, no elements."""
    weights = (weight, bias)
    tensors, strides, options = _prepared((x, gate), weights, rms, gate_first)
    gradients = [empty_like(t, x) for t in (x, gate)]
    dy = rows(dy)
    config = configured("gated_norm.backward", backward_config, x)
    programs, launch = _launch(x, options["HEADS"], config, SUMMING_PROGRAMS)
    shape = (len(x) * options["HEADS"], launch["split"][2], x.shape[3])
    sums = [None if w is None else torch.empty(shape, dtype=torch.float32, device=x.device) for w in weights]
    kernels.backward_kernel[(programs,)](
        *tensors,
        dy,
        *gradients,
        *(x if part is None else part for part in sums),
        *launch.pop("split"),
        scale,
        eps,
        *strides,
        *dy.stride()[:3],
        **options,
        **launch,
    )
    totals = iter(sum_all([part for part in sums if part is not None], torch.float32))
    by_weight = (empty_like(None, x) if w is None else next(totals).view(w.shape).to(w.dtype) for w in weights)
    return (*gradients, *by_weight)  # type: ignore[return-value]


@_backward.register_fake
def _(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    rms: bool,
    gate_first: bool,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(empty_like(t, x) for t in (x, gate, weight, bias))  # type: ignore[return-value]


def config_of(x: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=2048, num_warps=4, num_stages=1)


def backward_config(x: Tensor) -> Config:
    return Config(chunk=1, block=1024, num_warps=2, num_stages=1)


def _prepared(
    tokens: tuple[Tensor | None, ...], weights: tuple[Tensor | None, ...], rms: bool, gate_first: bool
) -> tuple[list[Tensor], list[int], dict[str, Any]]:
    """The inputs of both kernels, strides over groups, tokens and heads, and options. x stands in for what is None."""
    x = tokens[0]
    assert x is not None
    by_token = [rows(x if t is None else t) for t in tokens]
    by_head = [x if w is None else w.contiguous() for w in weights]
    heads = max([1, *(w.shape[1] for w in weights if w is not None)])
    options = {"GATE": tokens[1] is not None}
    options |= {"WEIGHT": weights[0] is not None, "BIAS": weights[1] is not None, "RMS": rms, "GATE_FIRST": gate_first}
    strides = [stride for t in by_token for stride in t.stride()[:3]]
    return by_token + by_head, strides, options | {"HEADS": heads}


def _launch(x: Tensor, heads: int, config: Config, most: int) -> tuple[int, dict[str, Any]]:
    """How many programs, and how they split the work: tokens, blocks of a program, programs of a group's head."""
    groups, M, H, V = x.shape
    block = triton.next_power_of_2(V)
    rows_of_block, steps, parts = split_rows(M * H // heads, block, config, most // (groups * heads))
    sizes = {"H": H, "V": V, "BLOCK_V": block, "ROWS": rows_of_block}
    return groups * heads * parts, {"split": (M, steps, parts), **sizes, "num_warps": config.num_warps}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = torch.ops.zoo.gated_norm_backward(*tensors, dy, *ctx.options)
    return *(None if t is None else g for t, g in zip(tensors, gradients, strict=True)), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
