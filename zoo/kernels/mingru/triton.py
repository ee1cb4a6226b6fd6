"""Both inputs in one pass over memory, both gradients in another. The batch is the first axis of every tensor."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, rows
from zoo.kernels.mingru import kernels


def mingru_inputs(candidate: Tensor, gate: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    check_launch("mingru_inputs", candidate, gate)
    if gate.numel() == 0:
        return candidate, gate.float()
    return torch.ops.zoo.mingru_inputs(candidate, gate, smallest)


@torch.library.custom_op("zoo::mingru_inputs", mutates_args=())
def _forward(candidate: Tensor, gate: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    x, dt = candidate.new_empty(candidate.shape), gate.new_empty(gate.shape, dtype=torch.float32)
    candidate, gate = (rows(y.flatten(0, 1)) for y in (candidate, gate))
    programs, options = _launch(gate, configured("mingru.forward", config_of, gate))
    kernels.forward_kernel[(programs,)](
        candidate, gate, x, dt, len(gate), smallest, candidate.stride(0), gate.stride(0), **options
    )
    return x, dt


@_forward.register_fake
def _(candidate: Tensor, gate: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    return candidate.new_empty(candidate.shape), gate.new_empty(gate.shape, dtype=torch.float32)


@torch.library.custom_op("zoo::mingru_inputs_backward", mutates_args=())
def _backward(candidate: Tensor, gate: Tensor, dx: Tensor, ddt: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    dcandidate, dgate = (y.new_empty(y.shape) for y in (candidate, gate))
    candidate, gate = (rows(y.flatten(0, 1)) for y in (candidate, gate))
    programs, options = _launch(gate, configured("mingru.backward", config_of, gate))
    kernels.backward_kernel[(programs,)](
        candidate, gate, dx.contiguous(), ddt.contiguous(), dcandidate, dgate, len(gate), smallest,
        candidate.stride(0), gate.stride(0), **options,
    )  # fmt: skip
    return dcandidate, dgate


@_backward.register_fake
def _(candidate: Tensor, gate: Tensor, dx: Tensor, ddt: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    return candidate.new_empty(candidate.shape), gate.new_empty(gate.shape)


def config_of(x: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=1024, num_warps=4, num_stages=1)


def _launch(x: Tensor, config: Config) -> tuple[int, dict[str, Any]]:
    M, D = x.shape
    block = triton.next_power_of_2(D)
    rows_of_block = max(1, min(config.block // block, triton.next_power_of_2(M)))
    options = {"D": D, "BLOCK_D": block, "ROWS": rows_of_block, "num_warps": config.num_warps}
    return triton.cdiv(M, rows_of_block), options


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    candidate, gate, ctx.smallest = inputs
    ctx.save_for_backward(candidate, gate)


def _gradients(ctx: Any, dx: Tensor, ddt: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.zoo.mingru_inputs_backward(*ctx.saved_tensors, dx, ddt, ctx.smallest), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
