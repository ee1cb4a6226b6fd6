"""Queries and keys in one pass over memory, all gradients in another. The batch is the first axis of every tensor."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, rows
from zoo.kernels.shared_keys import kernels


def shared_keys(C: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    check_launch("shared_keys", C, B, dt)
    if B.numel() == 0 or dt.numel() == 0:
        empty = B.new_empty(*dt.shape, B.shape[3])
        return empty.to(C.dtype), empty
    return torch.ops.zoo.shared_keys(C, B, dt)


@torch.library.custom_op("zoo::shared_keys", mutates_args=())
def _forward(C: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x.new_empty(*dt.shape, B.shape[3]) for x in (C, B))
    C, B = (rows(x.flatten(0, 1)) for x in (C, B))
    programs, options = _launch(B, dt, configured("shared_keys.forward", config_of, B))
    kernels.forward_kernel[(programs,)](
        C, B, dt.contiguous(), q, k, B.shape[0] * B.shape[1], B.shape[1], *C.stride()[:2], *B.stride()[:2], **options
    )
    return q, k


@_forward.register_fake
def _(C: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    return C.new_empty(*dt.shape, B.shape[3]), B.new_empty(*dt.shape, B.shape[3])


@torch.library.custom_op("zoo::shared_keys_backward", mutates_args=())
def _backward(B: Tensor, dt: Tensor, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dC, dB = (torch.empty(B.shape, dtype=x.dtype, device=x.device) for x in (dq, B))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    B = rows(B.flatten(0, 1))
    programs, options = _launch(B, dt, configured("shared_keys.backward", config_of, B))
    kernels.backward_kernel[(programs,)](
        B, dt.contiguous(), dq.contiguous(), dk.contiguous(), dC, dB, ddt, B.shape[0] * B.shape[1], B.shape[1],
        *B.stride()[:2], **options,
    )  # fmt: skip
    return dC, dB, ddt


@_backward.register_fake
def _(B: Tensor, dt: Tensor, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dq.new_empty(B.shape), B.new_empty(B.shape), dt.new_empty(dt.shape)


def config_of(B: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=2048, num_warps=4, num_stages=1)


def _launch(B: Tensor, dt: Tensor, config: Config) -> tuple[int, dict[str, Any]]:
    """How many programs, and options; B (tokens, G, N)."""
    tokens, G, N = B.shape
    R = dt.shape[2] // G
    block_r, block_n = triton.next_power_of_2(R), triton.next_power_of_2(N)
    rows_of_block = max(1, min(config.block // (block_r * block_n), triton.next_power_of_2(tokens * G)))
    options = {"R": R, "N": N, "BLOCK_R": block_r, "BLOCK_N": block_n, "ROWS": rows_of_block}
    return triton.cdiv(tokens * G, rows_of_block), {**options, "num_warps": config.num_warps}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.zoo.shared_keys_backward(*ctx.saved_tensors, dq, dk)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
