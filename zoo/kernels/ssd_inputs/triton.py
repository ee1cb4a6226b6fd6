"""One pass over memory, all gradients in another.

Every tensor of the custom ops has the members of a pack, each with a bias and a log_A of its own, as its first axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Config, check_launch, configured, fold_batch, rows
from zoo.kernels.parts import sum_all
from zoo.kernels.ssd_inputs import kernels

# Programs: enough to keep the memory of a GPU busy, and, where each leaves a sum of its own, not many more.
PROGRAMS = 16384
SUMMING_PROGRAMS = 4096


def ssd_inputs(C: Tensor, B: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_launch("ssd_inputs", C, B, dt, bias, log_A)
    if B.numel() == 0 or dt.numel() == 0:
        keys = B.new_empty(*dt.shape, B.shape[3])
        return keys.to(C.dtype), keys, dt.float()
    C_1, B_1, dt_1 = (x.flatten(0, 1)[None] for x in (C, B, dt))
    q, k, decay = torch.ops.zoo.ssd_inputs(C_1, B_1, dt_1, bias[None], log_A[None])
    shape = (*dt.shape, B.shape[3])
    return q.view(shape), k.view(shape), decay.view(dt.shape)


@torch.library.custom_op("zoo::ssd_inputs", mutates_args=())
def _forward(C: Tensor, B: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C and B (members, M, G, N), dt (members, M, H), bias and log_A (members, H)."""
    q, k = (x.new_empty(*dt.shape, B.shape[3]) for x in (C, B))
    decay = torch.empty(dt.shape, dtype=torch.float32, device=dt.device)
    C, B, dt = rows(C), rows(B), rows(dt)
    programs, split, options = _launch(B, dt, configured("ssd_inputs.forward", config_of, B), PROGRAMS)
    kernels.forward_kernel[(programs,)](
        C, B, dt, bias.contiguous(), log_A.contiguous(), q, k, decay, *split,
        *C.stride()[:3], *B.stride()[:3], *dt.stride()[:2], **options,
    )  # fmt: skip
    return q, k, decay


@_forward.register_fake
def _(C: Tensor, B: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (x.new_empty(*dt.shape, B.shape[3]) for x in (C, B))
    return q, k, dt.new_empty(dt.shape, dtype=torch.float32)


@torch.library.custom_op("zoo::ssd_inputs_backward", mutates_args=())
def _backward(
    B: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor, dq: Tensor, dk: Tensor, ddecay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dC, dB = (torch.empty(B.shape, dtype=x.dtype, device=x.device) for x in (dq, B))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    B, dt = rows(B), rows(dt)
    programs, split, options = _launch(B, dt, configured("ssd_inputs.backward", backward_config, B), SUMMING_PROGRAMS)
    shape = (len(B) * B.shape[2], split[3], options["R"])
    parts = [torch.empty(shape, dtype=torch.float32, device=B.device) for _ in range(2)]
    kernels.backward_kernel[(programs,)](
        B, dt, bias.contiguous(), log_A.contiguous(), dq.contiguous(), dk.contiguous(), ddecay.contiguous(),
        dC, dB, ddt, *parts, *split, *B.stride()[:3], *dt.stride()[:2], **options,
    )  # fmt: skip
    dbias, dlog_A = (total.view(bias.shape) for total in sum_all(parts, bias.dtype))
    return dC, dB, ddt, dbias, dlog_A.to(log_A.dtype)


@_backward.register_fake
def _(
    B: Tensor, dt: Tensor, bias: Tensor, log_A: Tensor, dq: Tensor, dk: Tensor, ddecay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return dq.new_empty(B.shape), *(x.new_empty(x.shape) for x in (B, dt, bias, log_A))  # type: ignore[return-value]


def config_of(B: Tensor) -> Config:
    """block: elements of a program's block; chunk is unused."""
    return Config(chunk=1, block=2048, num_warps=4, num_stages=1)


def backward_config(B: Tensor) -> Config:
    """With 16 elements a thread, of 2048 by 4 warps, a layout is chosen that takes three times as long."""
    return Config(chunk=1, block=2048, num_warps=2, num_stages=1)


def _launch(B: Tensor, dt: Tensor, config: Config, most: int) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """How many programs; tokens, groups, blocks of a program and programs of a member's group; and options."""
    members, M, G, N = B.shape
    R = dt.shape[2] // G
    block_r, block_n = triton.next_power_of_2(R), triton.next_power_of_2(N)
    size = max(1, min(config.block // (block_r * block_n), triton.next_power_of_2(M)))
    blocks = triton.cdiv(M, size)
    steps = triton.cdiv(blocks, max(1, most // (members * G)))
    parts = triton.cdiv(blocks, steps)
    options = {"R": R, "N": N, "BLOCK_R": block_r, "BLOCK_N": block_n, "ROWS": size, "num_warps": config.num_warps}
    return members * G * parts, (M, G, steps, parts), options


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx: Any, dq: Tensor, dk: Tensor, ddecay: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.zoo.ssd_inputs_backward(*ctx.saved_tensors, dq, dk, ddecay)


_forward.register_autograd(_gradients, setup_context=_setup_context)
fold_batch(_forward)
fold_batch(_backward)
